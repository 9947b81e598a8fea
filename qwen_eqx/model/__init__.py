"""The decoder: one forward pass, its cache, its named places and what can be done to them."""
