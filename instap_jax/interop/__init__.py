"""Weights of other projects in and out of our layout: one key table a layout, read both ways."""
