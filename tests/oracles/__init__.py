"""Independent PyTorch implementations that the JAX code is compared with; no code is shared."""
