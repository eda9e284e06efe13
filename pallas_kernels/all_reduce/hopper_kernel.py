"""The all-reduce kernel for a few GPUs of one host: every device writes to all others' memory.

There are no signals. A place without data holds a word that no device sends (`peer_memory.EMPTY`).
A reader polls its own memory until each word has arrived, then resets the place ("Lamport" in
NVIDIA's TensorRT-LLM). Calls alternate between two sets of places: a device in call n + 2 has had
words of call n + 1 from all others, which they sent after their kernel of call n had ended, so the
set that it writes to has been read and reset.

So calls must run one after the other on a device's stream, the same calls in the same order on
every device of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, math, vector

from pallas_kernels.all_reduce import ptx
from pallas_kernels.all_reduce.peer_memory import CAPACITY, EMPTY, HEADER
from pallas_kernels.all_reduce.ptx import PIECE, WORDS, Value, asm, equal, i32, offset, word_type

WARP, WARPGROUP = 32, 128
PATIENCE = 1 << 26  # polls until the kernel ends with an error, after most of a minute
SHARED = ".relaxed.sys"
LOAD_SCRATCH = "ld.shared.b32 $0, [$1];"
LOAD_WORD = "ld.relaxed.gpu.global.b32 $0, [$1];"
_EMPTY = EMPTY - (1 << 32)  # as a signed word


def build_all_reduce(
    shape: tuple[int, int], dtype: jnp.dtype, *, devices: int, residual: bool, eps: float | None
) -> Any:
    """Makes the callable: parts, [residual], [weight], table -> [sum] or [sum, its RMSNorm].

    Parts, residual and results are [rows, columns], the weight is [columns]. The sum over the group
    of `devices` is made in float32 in their order and rounded, then the residual is added. eps is
    the norm's, None without a norm. With a norm each CTA makes one row.
    """
    rows, columns = shape
    in_row = columns * jnp.dtype(dtype).itemsize // PIECE
    groups = 1 if eps is None else in_row // WARPGROUP
    threads = groups * WARPGROUP
    count = rows * in_row
    ctas = -(-count // threads)
    inputs, results = 2 + residual + (eps is not None), 1 + (eps is not None)

    def exchange(_: Any, *refs: Value) -> None:
        parts, *optional, table = map(ptx.address, refs[:inputs])
        outs = list(map(ptx.address, refs[inputs : inputs + results]))
        element = ptx.utils.dtype_to_ir_type(jnp.dtype(dtype))
        thread = ptx.index_x(gpu.thread_id)
        piece = arith.addi(arith.muli(ptx.index_x(gpu.block_id), i32(threads)), thread)
        exists = arith.cmpi(arith.CmpIPredicate.slt, piece, i32(count))

        def load_row(start: Value) -> list[Value]:
            return ptx.choose(
                exists, lambda: ptx.load(offset(start, piece, PIECE)), lambda: [i32(0)] * WORDS
            )

        # Issue all independent loads first.
        loaded = load_row(parts)
        rank = asm(LOAD_WORD, table, result=word_type())
        wide = ir.IntegerType.get_signless(64)
        homes = [
            asm("ld.global.b64 $0, [$1];", offset(table, i32(1 + d), 8), result=wide)
            for d in range(devices)
        ]
        own = homes[0]
        for device in range(1, devices):
            own = arith.select(equal(rank, device), homes[device], own)
        epoch = asm(LOAD_WORD, own, result=word_type())
        stream = load_row(optional[0]) if residual else None
        weight = None if eps is None else ptx.load(offset(optional[-1], thread, PIECE))

        sent = [arith.select(equal(word, _EMPTY), i32(0), word) for word in loaded]
        skipped = arith.muli(arith.andi(epoch, i32(1)), i32(devices * CAPACITY))
        first = arith.addi(skipped, i32(HEADER))

        def place(home: Value, sender: Value) -> Value:
            """Returns the address of the thread's words from `sender` in the memory of `home`."""
            start = arith.addi(first, arith.muli(sender, i32(CAPACITY)))
            return offset(offset(home, start, 1), piece, PIECE)

        for device, home in enumerate(homes):
            other = arith.andi(exists, ptx.negate(equal(rank, device)))
            target = place(home, rank)
            with ptx.utils.when(other):
                ptx.store(target, sent, SHARED)
        gpu.barrier()  # all threads of the CTA have read the epoch
        with ptx.utils.when(equal(thread, 0)):  # the last CTA starts the next epoch
            inc = "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;"
            before = asm(inc, offset(own, i32(1), 4), i32(ctas - 1), result=word_type())
            following = arith.addi(epoch, i32(1))
            is_last = equal(before, ctas - 1)
            asm("st.relaxed.gpu.global.b32 [$0], $1;", own, following, predicate=is_last)

        arrived = []
        for device in range(devices):
            # A thread without a piece has nothing to wait for.
            ready = arith.ori(equal(rank, device), ptx.negate(exists))
            words = ptx.choose(ready, lambda: sent, _receive(place(own, i32(device))))
            arrived.append(ptx.unpack(words, element))
        total = arrived[0]
        for part in arrived[1:]:
            total = arith.addf(total, part)
        if stream is not None:
            rounded = ptx.unpack(ptx.pack(total, element), element)
            total = arith.addf(rounded, ptx.unpack(stream, element))
        summed = ptx.pack(total, element)
        with ptx.utils.when(exists):
            ptx.store(offset(outs[0], piece, PIECE), summed)
        if eps is not None and weight is not None:
            values = ptx.unpack(summed, element)
            scale = _norm_scale(values, columns, eps, ptx.address(refs[-1]), groups)
            scaled = ptx.unpack(ptx.pack(arith.mulf(values, scale), element), element)
            normed = ptx.pack(arith.mulf(scaled, ptx.unpack(weight, element)), element)
            ptx.store(offset(outs[1], piece, PIECE), normed)

    def sum_over_devices(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(exchange)(*refs)

    return plgpu.kernel(
        sum_over_devices,
        out_type=[jax.ShapeDtypeStruct((rows, columns), dtype)] * results,
        scratch_types=[] if eps is None else [plgpu.SMEM((threads // WARP,), jnp.float32)],
        grid=(ctas,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _receive(at: Value) -> Callable[[], list[Value]]:
    """Polls a place until all words have arrived, then resets it."""

    def wait() -> list[Value]:
        kinds = [word_type()] * (1 + WORDS)
        loop = ptx.scf.WhileOp(kinds, [i32(0)])
        block = loop.before.blocks.append(word_type())
        with ir.InsertionPoint(block):
            polls = block.arguments[0]
            words = ptx.load(at, SHARED)
            missing = equal(words[0], _EMPTY)
            for word in words[1:]:
                missing = arith.ori(missing, equal(word, _EMPTY))
            asm("trap;", predicate=equal(polls, PATIENCE))
            ptx.scf.condition(missing, [arith.addi(polls, i32(1)), *words])
        block = loop.after.blocks.append(*kinds)
        with ir.InsertionPoint(block):
            ptx.scf.yield_([block.arguments[0]])
        ptx.store(at, [i32(_EMPTY)] * WORDS, SHARED)
        return list(loop.results)[1:]

    return wait


def _norm_scale(values: Value, columns: int, eps: float, scratch: Value, groups: int) -> Value:
    """Returns 1 / sqrt(mean of squares + eps) of the CTA's row, for each of the thread's values."""
    squares = arith.mulf(values, values)
    total = vector.extract(squares, [], [0])
    for i in range(1, ir.VectorType(values.type).shape[0]):
        total = arith.addf(total, vector.extract(squares, [], [i]))
    for distance in (16, 8, 4, 2, 1):
        total = arith.addf(total, ptx.utils.shfl_bfly(total, distance))
    thread = ptx.index_x(gpu.thread_id)
    warp = arith.divui(thread, i32(WARP))
    first = equal(arith.remui(thread, i32(WARP)), 0)
    asm("st.shared.b32 [$0], $1;", offset(scratch, warp, 4), total, predicate=first)
    gpu.barrier()
    single = ir.F32Type.get()
    total = asm(LOAD_SCRATCH, scratch, result=single)
    for i in range(1, groups * WARPGROUP // WARP):
        part = asm(LOAD_SCRATCH, offset(scratch, i32(i), 4), result=single)
        total = arith.addf(total, part)
    mean = arith.mulf(total, ptx.utils.c(1 / columns, single))
    return vector.broadcast(values.type, math.rsqrt(arith.addf(mean, ptx.utils.c(eps, single))))
