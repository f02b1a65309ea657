"""A model whose weights are stacked: one set for each of many clients, computed with at once."""
