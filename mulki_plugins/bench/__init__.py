"""Measures a few steps, an evaluation and a checkpoint of a recipe, and predicts the time of the whole run from them."""
