"""Recipes and strategies: from YAML text to a checked experiment, without torch.

`resolve` is the way through: `files` finds a recipe, `yaml` reads it with its lines, `layers` lays it over the strategy's
defaults and under the command line, `check` compares it with `schema` and with what is registered, `suggest` adds to each
mistake what was probably meant. `emit`, `json_schema` and `settings` describe the result.
"""
