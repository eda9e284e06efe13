"""The all-reduce kernel for a few GPUs of one host: every device writes to all others' memory.

There are no signals. A place without data holds a word that no device sends (`peer_memory.EMPTY`).
A reader polls its own memory until each word has arrived, then resets the place ("Lamport" in
NVIDIA's TensorRT-LLM). Calls alternate between two sets of places: a device in call n + 2 has had
words of call n + 1 from all others, which they sent after their kernel of call n had ended, so the
set that it writes to has been read and reset.

So calls must run one after the other on a device's stream, the same calls in the same order on
every device of the group.

The kernel is written in MLIR with PTX: Pallas' references belong to the kernel's own device, and
the memory of other devices is known by its address alone.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, math, vector

from pallas_kernels.all_reduce.peer_memory import CAPACITY, EMPTY, HEADER
from pallas_kernels.ptx import (
    PIECE,
    WARP,
    WARPGROUP,
    WORDS,
    Value,
    add,
    address,
    asm,
    choose,
    equal,
    i32,
    index_x,
    load,
    load_address,
    mul,
    negate,
    offset,
    over_cta,
    pack,
    scf,
    store,
    unpack,
    utils,
    word_type,
)

PATIENCE = 1 << 26  # polls until the kernel ends with an error, after most of a minute
_EMPTY = EMPTY - (1 << 32)  # as a signed word
SHARED = ".relaxed.sys"  # memory that several devices read and write
LOAD_WORD = "ld.relaxed.gpu.global.b32 $0, [$1];"


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
    ctas = -(-rows * in_row // threads)
    inputs, results = 2 + residual + (eps is not None), 1 + (eps is not None)

    def exchange(_: Any, *refs: Value) -> None:
        parts, *optional, table = map(address, refs[:inputs])
        outs = list(map(address, refs[inputs : inputs + results]))
        element = utils.dtype_to_ir_type(jnp.dtype(dtype))
        thread = index_x(gpu.thread_id)
        piece = add(mul(index_x(gpu.block_id), i32(threads)), thread)
        exists = arith.cmpi(arith.CmpIPredicate.slt, piece, i32(rows * in_row))

        def load_row(start: Value) -> list[Value]:
            return choose(
                exists, lambda: load(offset(start, piece, PIECE)), lambda: [i32(0)] * WORDS
            )

        # Issue all independent loads first.
        loaded = load_row(parts)
        rank = asm(LOAD_WORD, table, result=word_type())
        homes = [load_address(offset(table, i32(1 + d), 8)) for d in range(devices)]
        own_home = homes[0]
        for device in range(1, devices):
            own_home = arith.select(equal(rank, device), homes[device], own_home)
        epoch = asm(LOAD_WORD, own_home, result=word_type())
        stream = load_row(optional[0]) if residual else None
        weight = None if eps is None else load(offset(optional[-1], thread, PIECE))

        sent = [arith.select(equal(word, _EMPTY), i32(0), word) for word in loaded]
        skipped = mul(arith.andi(epoch, i32(1)), i32(devices * CAPACITY))
        first = add(skipped, i32(HEADER))

        def place(home: Value, sender: Value) -> Value:
            """Returns the address of the thread's words from `sender` in the memory of `home`."""
            start = add(first, mul(sender, i32(CAPACITY)))
            return offset(offset(home, start, 1), piece, PIECE)

        for device, home in enumerate(homes):
            other = arith.andi(exists, negate(equal(rank, device)))
            target = place(home, rank)
            with utils.when(other):
                store(target, sent, SHARED)
        gpu.barrier()  # all threads of the CTA have read the epoch
        with utils.when(equal(thread, 0)):  # the last CTA starts the next epoch
            inc = "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;"
            before = asm(inc, offset(own_home, i32(1), 4), i32(ctas - 1), result=word_type())
            following = add(epoch, i32(1))
            is_last = equal(before, ctas - 1)
            asm("st.relaxed.gpu.global.b32 [$0], $1;", own_home, following, predicate=is_last)

        arrived = []
        for device in range(devices):
            # A thread without a piece has nothing to wait for.
            ready = arith.ori(equal(rank, device), negate(exists))
            source = place(own_home, i32(device))
            words = choose(ready, lambda: sent, partial(receive, source))
            arrived.append(unpack(words, element))
        total = reduce(arith.addf, arrived)
        if stream is not None:
            rounded = unpack(pack(total, element), element)
            total = arith.addf(rounded, unpack(stream, element))
        summed = pack(total, element)
        with utils.when(exists):
            store(offset(outs[0], piece, PIECE), summed)
        if eps is not None and weight is not None:
            values = unpack(summed, element)
            scale = norm_scale(values, columns, eps, address(refs[-1]), threads // WARP)
            scaled = unpack(pack(arith.mulf(values, scale), element), element)
            normed = pack(arith.mulf(scaled, unpack(weight, element)), element)
            store(offset(outs[1], piece, PIECE), normed)

    def sum_over_devices(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(exchange)(*refs)

    return plgpu.kernel(
        sum_over_devices,
        out_type=[jax.ShapeDtypeStruct(shape, dtype)] * results,
        scratch_types=[] if eps is None else [plgpu.SMEM((threads // WARP,), jnp.float32)],
        grid=(ctas,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def receive(at: Value) -> list[Value]:
    """Polls a place until all words have arrived, then resets it."""
    kinds = [word_type()] * (1 + WORDS)
    loop = scf.WhileOp(kinds, [i32(0)])
    block = loop.before.blocks.append(word_type())
    with ir.InsertionPoint(block):
        polls = block.arguments[0]
        words = load(at, SHARED)
        missing = reduce(arith.ori, (equal(word, _EMPTY) for word in words))
        asm("trap;", predicate=equal(polls, PATIENCE))
        scf.condition(missing, [add(polls, i32(1)), *words])
    block = loop.after.blocks.append(*kinds)
    with ir.InsertionPoint(block):
        scf.yield_([block.arguments[0]])
    store(at, [i32(_EMPTY)] * WORDS, SHARED)
    return list(loop.results)[1:]


def norm_scale(values: Value, columns: int, eps: float, scratch: Value, warps: int) -> Value:
    """Returns 1 / sqrt(mean of squares + eps) of the CTA's row, for each of the thread's values."""
    squares, count = arith.mulf(values, values), ir.VectorType(values.type).shape[0]
    total = reduce(arith.addf, (vector.extract(squares, [], [i]) for i in range(count)))
    total = over_cta(arith.addf, total, scratch, warps)
    single = ir.F32Type.get()
    mean = arith.mulf(total, utils.c(1 / columns, single))
    return vector.broadcast(values.type, math.rsqrt(arith.addf(mean, utils.c(eps, single))))
