#!/usr/bin/env python3
"""Finds a checkpoint's retrieval heads for the scorer "heads": the same as `pdllm-calibrate`."""

from convert.calibrate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
