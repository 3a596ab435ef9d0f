"""After the run: the trained model as a folder for open_clip, predictions on images, accuracy in other scopes."""
