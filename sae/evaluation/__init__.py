"""What a dictionary is worth, and what its latents fire on."""
