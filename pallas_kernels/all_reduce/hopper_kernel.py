"""The kernel for sums over a few GPUs of one host: every device writes to the memory of all others.

Nothing is signalled. A place that nothing has been written to holds a word that no device sends
(`exchange.EMPTY`), so that a reader polls its own memory until each word has come, and then empties
the place again ("Lamport" in NVIDIA's TensorRT-LLM). There are two sets of places, taken in turn: a
device that makes call n + 2 has had words of call n + 1 from all others. They sent these after
their kernel of call n had ended, so that what it writes to has been read and emptied.

So calls must follow each other on the device's stream, the same ones in the same order on every
device of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, math, vector

from pallas_kernels.all_reduce import ptx as words
from pallas_kernels.all_reduce.peer_memory import EMPTY, HEADER
from pallas_kernels.all_reduce.ptx import PIECE, WORDS, Value, ahead, equal, i32

WARP, WARPGROUP = 32, 128
PATIENCE = 1 << 26  # polls until the kernel ends with an error, the better part of a minute
SHARED = ".relaxed.sys"


def build_sum(
    rows: int,
    columns: int,
    dtype: jnp.dtype,
    *,
    devices: int,
    capacity: int,
    residual: bool = False,
    eps: float | None = None,
) -> Any:
    """The callable: parts, perhaps residual, both [rows, columns], perhaps weight [columns], table
    -> [sum] [rows, columns], with a weight [sum, its RMSNorm].

    The sum is made in float32 in the order of the devices and rounded, then the residual is added.
    capacity: bytes that one device may send. eps: of the norm, which is only made where it is
    given; then a block of threads makes a row.
    """
    in_row = columns * jnp.dtype(dtype).itemsize // PIECE
    groups = 1 if eps is None else in_row // WARPGROUP
    threads = groups * WARPGROUP
    count = rows * in_row
    blocks = -(-count // threads)
    inputs, results = 2 + residual + (eps is not None), 1 + (eps is not None)

    def exchange(_: Any, *refs: Value) -> None:
        parts, *more, table = map(words.address, refs[:inputs])
        outs = list(map(words.address, refs[inputs : inputs + results]))
        element = words.utils.dtype_to_ir_type(jnp.dtype(dtype))
        thread = words.index(gpu.thread_id)
        place = arith.addi(arith.muli(words.index(gpu.block_id), i32(threads)), thread)
        exists = arith.cmpi(arith.CmpIPredicate.slt, place, i32(count))

        def load_row(start: Value) -> list[Value]:
            return words.choose(
                exists, lambda: words.load(ahead(start, place, PIECE)), lambda: [i32(0)] * WORDS
            )

        # Whatever can be asked for is, before the first of it is needed.
        loaded = load_row(parts)
        rank = words.load_word(table)
        homes = [words.load_address(ahead(table, i32(1 + d), 8)) for d in range(devices)]
        own = homes[0]
        for device in range(1, devices):
            own = arith.select(equal(rank, device), homes[device], own)
        epoch = words.load_word(own)
        before = load_row(more[0]) if residual else None
        weight = None if eps is None else words.load(ahead(more[-1], thread, PIECE))

        sent = [arith.select(_is_empty(word), i32(0), word) for word in loaded]
        taken = arith.muli(arith.andi(epoch, i32(1)), i32(devices * capacity))
        first = arith.addi(taken, i32(HEADER))

        def box(home: Value, sender: Value) -> Value:
            """Where the thread's words from `sender` lie in the memory of `home`."""
            offset = arith.addi(first, arith.muli(sender, i32(capacity)))
            return ahead(ahead(home, offset, 1), place, PIECE)

        for device, home in enumerate(homes):
            other = arith.andi(exists, words.negate(equal(rank, device)))
            words.when(other, _storing(box(home, rank), sent))
        gpu.barrier()  # every thread of the block has read the epoch
        words.when(equal(thread, 0), lambda: _count_block(own, epoch, blocks))

        came = []
        for device in range(devices):
            # Where a thread has nothing to do it has nothing to wait for.
            here = arith.ori(equal(rank, device), words.negate(exists))
            arrived = _arriving(box(own, i32(device)))
            came.append(words.widen(words.choose(here, lambda: sent, arrived), element))
        total = came[0]
        for part in came[1:]:
            total = arith.addf(total, part)
        if before is not None:
            rounded = words.widen(words.narrow(total, element), element)
            total = arith.addf(rounded, words.widen(before, element))
        summed = words.narrow(total, element)
        words.when(exists, lambda: words.store(ahead(outs[0], place, PIECE), summed))
        if eps is not None and weight is not None:
            values = words.widen(summed, element)
            scale = _norm_scale(values, columns, eps, words.address(refs[-1]), groups)
            scaled = words.widen(words.narrow(arith.mulf(values, scale), element), element)
            made = words.narrow(arith.mulf(scaled, words.widen(weight, element)), element)
            words.store(ahead(outs[1], place, PIECE), made)

    def sum_over_devices(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(exchange)(*refs)

    return plgpu.kernel(
        sum_over_devices,
        out_type=[jax.ShapeDtypeStruct((rows, columns), dtype)] * results,
        scratch_types=[] if eps is None else [plgpu.SMEM((threads // WARP,), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _is_empty(word: Value) -> Value:
    return equal(word, EMPTY - (1 << 32))


def _storing(at: Value, sent: Sequence[Value]) -> Callable[[], None]:
    return lambda: words.store(at, sent, SHARED)


def _arriving(at: Value) -> Callable[[], list[Value]]:
    """Polls until all words are there, and empties their place."""

    def wait() -> list[Value]:
        kinds = [words.word_type()] * (1 + WORDS)
        loop = words.scf.WhileOp(kinds, [i32(0)])
        block = loop.before.blocks.append(words.word_type())
        with ir.InsertionPoint(block):
            polls = block.arguments[0]
            found = words.load(at, SHARED)
            missing = _is_empty(found[0])
            for word in found[1:]:
                missing = arith.ori(missing, _is_empty(word))
            words.give_up(equal(polls, PATIENCE))
            words.scf.condition(missing, [arith.addi(polls, i32(1)), *found])
        block = loop.after.blocks.append(*kinds)
        with ir.InsertionPoint(block):
            words.scf.yield_([block.arguments[0]])
        words.store(at, [i32(EMPTY - (1 << 32))] * WORDS, SHARED)
        return list(loop.results)[1:]

    return wait


def _count_block(own: Value, epoch: Value, blocks: int) -> None:
    """One thread of each block is here; the last of them starts the next epoch."""
    before = words.count_to(ahead(own, i32(1), 4), blocks - 1)
    words.store_word(own, arith.addi(epoch, i32(1)), equal(before, blocks - 1))


def _norm_scale(values: Value, columns: int, eps: float, scratch: Value, groups: int) -> Value:
    """1 / sqrt(mean of squares + eps) of the block's row, for each of the thread's values."""
    squares = arith.mulf(values, values)
    total = vector.extract(squares, [], [0])
    for i in range(1, ir.VectorType(values.type).shape[0]):
        total = arith.addf(total, vector.extract(squares, [], [i]))
    for distance in (16, 8, 4, 2, 1):
        total = arith.addf(total, words.utils.shfl_bfly(total, distance))
    thread = words.index(gpu.thread_id)
    warp = arith.divui(thread, i32(WARP))
    first = equal(arith.remui(thread, i32(WARP)), 0)
    words.store_scratch(ahead(scratch, warp, 4), total, first)
    gpu.barrier()
    total = words.load_scratch(scratch)
    for i in range(1, groups * WARPGROUP // WARP):
        total = arith.addf(total, words.load_scratch(ahead(scratch, i32(i), 4)))
    mean = arith.mulf(total, words.f32(1 / columns))
    return vector.broadcast(values.type, math.rsqrt(arith.addf(mean, words.f32(eps))))
