"""The Hopper kernel between two wide fp8 products: SwiGLU of raw products, quantised to fp8.

A CTA makes a row at a time, and holds its activations in registers until their largest magnitude is
known, so the products are read once; the next row is on its way meanwhile. The kernel is written in MLIR with PTX, as the conversion to fp8 has
no other form in which a thread's eight values stay where they are.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, math, vector

from pallas_kernels import compat
from pallas_kernels.ptx import (
    PIECE,
    WARP,
    WARPGROUP,
    WORDS,
    Value,
    add,
    address,
    asm,
    equal,
    i32,
    index_x,
    load,
    mul,
    offset,
    over_cta,
    scf,
    unpack,
    utils,
    word_type,
)

LARGEST = 448.0
_EACH = PIECE // 2  # values of a piece of 16 bits
_TO_FP8 = """{ .reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high}; }"""


def threads(columns: int) -> int | None:
    """Returns the threads of a CTA; None if the kernel does not take rows of so many columns."""
    for groups in (4, 3, 2, 1):
        pieces, rest = divmod(columns, groups * WARPGROUP * _EACH)
        if not rest and pieces <= 4:
            return groups * WARPGROUP
    return None


def build_swiglu(rows: int, columns: int) -> Any:
    """Makes the callable: gate, up [R, N], their scales [R], [N], [N] -> fp8 [R, N], scales [R].

    gate and up are raw products in bfloat16; a product is the raw value times the scales of row and
    column. Activations are float32 until they are fp8.
    """
    count = threads(columns)
    assert count is not None
    pieces, ctas = columns // _EACH // count, min(rows, compat.sm_count())

    def run(_: Any, *refs: Value) -> None:
        gate, up, row_scale, gate_scale, up_scale, values, scales, scratch = map(address, refs)
        element, single = ir.BF16Type.get(), ir.F32Type.get()
        block, thread = index_x(gpu.block_id), index_x(gpu.thread_id)
        places = [add(thread, i32(count * i)) for i in range(pieces)]

        def piece_of(row: Value, at: Value) -> Value:
            return add(mul(row, i32(columns // _EACH)), at)

        def load_row(row: Value) -> list[Value]:
            ats = [piece_of(row, at) for at in places]
            words = [word for at in ats for x in (gate, up) for word in load(offset(x, at, PIECE))]
            return [*words, asm("ld.global.b32 $0, [$1];", offset(row_scale, row, 4), result=single)]

        def by_column(scale: Value, at: Value) -> Value:
            halves = [add(add(at, at), i32(half)) for half in (0, 1)]
            words = [word for half in halves for word in load(offset(scale, half, PIECE))]
            packed = vector.from_elements(ir.VectorType.get((_EACH,), word_type()), words)
            return vector.bitcast(ir.VectorType.get((_EACH,), single), packed)

        def activation(words: list[Value], at: Value, by_row: Value) -> list[Value]:
            g, u = (
                arith.mulf(unpack(x, element), by_column(scale, at))
                for x, scale in ((words[:WORDS], gate_scale), (words[WORDS:], up_scale))
            )
            pairs = ([vector.extract(x, [], [i]) for x in (g, u)] for i in range(_EACH))
            return [silu(*(arith.mulf(x, by_row) for x in pair)) for pair in pairs]

        def make(row: Value, words: list[Value], by_row: Value, to: Value) -> None:
            each = 2 * WORDS
            made = [
                activation(words[each * i : each * (i + 1)], at, by_row)
                for i, at in enumerate(places)
            ]
            most = reduce(arith.maximumf, (math.absf(x) for piece in made for x in piece))
            most = over_cta(arith.maximumf, most, to, count // WARP)
            # As `scaled.factors`.
            scale = arith.mulf(most, constant(1 / LARGEST))
            small = arith.cmpf(arith.CmpFPredicate.OLT, scale, constant(np.finfo(np.float32).tiny))
            scale = arith.select(small, constant(1.0), scale)
            inverse = arith.divf(constant(1.0), scale)
            first = equal(thread, 0)
            asm("st.global.b32 [$0], $1;", offset(scales, row, 4), scale, predicate=first)
            for piece, at in zip(made, places, strict=True):
                scaled = [arith.mulf(x, inverse) for x in piece]
                low, high = (asm(_TO_FP8, *scaled[i : i + 4], result=word_type()) for i in (0, 4))
                target = offset(values, piece_of(row, at), PIECE // 2)
                asm("st.global.v2.b32 [$0], {$1, $2};", target, low, high)

        # Two places in shared memory in turn: a CTA waits once for each row.
        turn = i32(0)
        loop = scf.ForOp(block, i32(rows), i32(ctas), [turn, *load_row(block)])
        with ir.InsertionPoint(loop.body):
            row, (turn, *words, by_row) = loop.induction_variable, loop.inner_iter_args
            following = load_row(arith.minsi(add(row, i32(ctas)), i32(rows - 1)))
            make(row, words, by_row, offset(scratch, turn, count // WARP * 4))
            scf.yield_([arith.xori(turn, i32(1)), *following])

    def swiglu_fp8(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(run)(*refs)

    return plgpu.kernel(
        swiglu_fp8,
        out_type=[
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((2 * count // WARP,), jnp.float32)],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=count // WARPGROUP,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def constant(value: Any) -> Value:
    return utils.c(float(value), ir.F32Type.get())


def silu(gate: Value, up: Value) -> Value:
    """Returns gate / (1 + exp(-gate)) * up."""
    single = ir.F32Type.get()
    power = asm("ex2.approx.ftz.f32 $0, $1;", arith.mulf(gate, constant(-1.4426950408889634)), result=single)
    inverse = asm("rcp.approx.ftz.f32 $0, $1;", arith.addf(power, constant(1.0)), result=single)
    return arith.mulf(arith.mulf(gate, inverse), up)
