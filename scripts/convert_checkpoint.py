#!/usr/bin/env python3
"""Converts a PyTorch checkpoint (LLaDA, Dream) to Orbax, or back: the same as `pdllm-convert`."""

from convert.__main__ import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
