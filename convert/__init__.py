"""Checkpoint formats: PyTorch folders (safetensors, .bin) to Orbax, and back."""

from convert.convert import Report, convert, converted
from convert.export import reverse

__all__ = ["Report", "convert", "converted", "reverse"]
