"""Recipes and strategies: from YAML text to a checked experiment, without torch."""
