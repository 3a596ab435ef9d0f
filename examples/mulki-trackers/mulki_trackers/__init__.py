"""Loggers for MulKI: Weights & Biases and MLflow."""
