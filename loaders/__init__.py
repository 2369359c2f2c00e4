"""Loaders that turn data into rows of one schema."""
