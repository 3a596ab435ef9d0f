"""A stream for MulKI of drawn instruments."""
