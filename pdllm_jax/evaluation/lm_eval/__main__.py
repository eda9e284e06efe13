"""lm-eval's command line, with `--model pdllm` registered."""

import sys

try:
    import pdllm_jax.evaluation.lm_eval  # noqa: F401
except ImportError as error:
    sys.exit(f"error: {error}")

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
