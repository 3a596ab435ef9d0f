"""Names and their meaning: the parts a recipe can use, the packages they come from, and the options they take."""
