"""The jitted functions of an answer, lowered for shapes: what the compiler says they need.

`pdllm_jax.engine.programs` traces them. Compiling them takes as long as before a first answer;
`plan_memory` predicts their memory without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.engine import programs as engine
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor


class Program(NamedTuple):
    """A jitted function at certain shapes.

    phase: of the plan; name: of the function; lower: traces and lowers it; held: bytes on the
    device before it runs, its arguments included.
    """

    phase: str
    name: str
    lower: Callable[[], Any]
    held: int


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree's arrays, or of the shapes in their place."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def programs(
    config: ModelConfig,
    shapes: engine.Shapes,
    selection: SelectionConfig,
    decode: DecodeConfig,
    *,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
    sharding: Sharding | None = None,
) -> Iterator[Program]:
    """The programs in the order in which an answer runs them; nothing is allocated.

    shapes, selection, decode: of a plan. sharding: of all arguments, to compile for a device that
    this machine does not have.
    """
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))

    def placed(value: Any) -> Any:
        def one(x: Any) -> Any:
            if not hasattr(x, "dtype"):
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, value)

    for program in engine.programs(model, shapes, selection, decode, implementation):
        args = placed(program.args)
        settings = {name: placed(value) for name, value in program.settings.items()}

        def lower(function: Any = program.function, args: Any = args, settings: Any = settings):
            return function.lower(*args, **settings)

        held = tree_bytes(dict(program.held))
        yield Program(program.phase, program.function.__name__, lower, held)
