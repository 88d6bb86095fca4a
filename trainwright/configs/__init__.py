"""Recipes: a Hydra tree and its typed schema."""
