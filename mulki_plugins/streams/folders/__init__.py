"""The stream `folders`: the user's own images, in one folder per class."""
