"""Dictionaries on disk: SAELens' layout, and other teams'."""
