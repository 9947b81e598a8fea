"""Where the packages meet: what commands, scripts and notebooks share."""
