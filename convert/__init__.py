"""Checkpoint formats: PyTorch folders (safetensors, .bin) to Orbax, and back."""

from convert.cached import converted
from convert.convert import Report, convert
from convert.export import reverse

__all__ = ["Report", "convert", "converted", "reverse"]
