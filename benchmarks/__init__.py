"""Figures, each as a ratio to a named reference in the same run. Nothing here asserts a time."""
