"""Sparse codes, and the products that touch only the rows they name."""
