"""Prompts in, tokens and activations out, in one compiled loop."""
