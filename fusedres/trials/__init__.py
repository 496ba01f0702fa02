"""Recipes on trial: where no table names a recipe, the first real calls of a block are measured, and one is kept."""
