"""The small masked diffusion model: its base, its data, its training and its adapter."""
