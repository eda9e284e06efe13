"""The console script `pdllm`: pdllm_jax.cli, with PyTorch folders converted on first use."""

from typing import NoReturn

from convert.__main__ import converted
from pdllm_jax import cli
from pdllm_jax.cli.errors import leave


def main() -> NoReturn:
    """Runs `pdllm` and ends the process."""
    leave(cli.main(resolve=converted))
