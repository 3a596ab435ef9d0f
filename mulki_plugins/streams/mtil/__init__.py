"""The published MTIL: eleven data sets on the user's disk, in the layouts of torchvision. See docs/mtil.md."""
