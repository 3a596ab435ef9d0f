"""A stage for MulKI that distils on shuffled tiles."""
