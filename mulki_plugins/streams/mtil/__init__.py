"""The published MTIL: eleven data sets on the user's disk, in torchvision's layouts. See docs/mtil.md."""
