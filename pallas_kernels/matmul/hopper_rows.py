"""The Hopper kernel between two wide fp8 products: from raw products to rows in fp8.

A CTA makes a row at a time, and holds it in registers until its largest magnitude is known, so
everything is read once; the next row is on its way meanwhile. The kernel is written in MLIR with
PTX, as the conversion to fp8 has no other form in which a thread's values stay where they are.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

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
    pack,
    scf,
    store,
    unpack,
    utils,
    word_type,
)

Kind = Literal["swiglu", "add_norm"]
LARGEST = 448.0
_EACH = PIECE // 2  # values of a piece of 16 bits
_TO_FP8 = """{ .reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high}; }"""


def threads(columns: int) -> int | None:
    """Returns the threads of a CTA; None if the kernel does not take rows of so many columns."""
    for groups in (2, 4, 1):
        pieces, rest = divmod(columns, groups * WARPGROUP * _EACH)
        if not rest and 0 < pieces <= 3:
            return groups * WARPGROUP
    return None


def build_rows(kind: Kind, rows: int, columns: int, eps: float = 0.0) -> Any:
    """Makes the callable: rows in bfloat16 -> [sum,] fp8 [R, N], their scales [R].

    A product is a raw value times the scales of row and column. All is float32 until it is fp8.

      swiglu: gate, up [R, N], their scales [R], [N], [N]: silu(gate product) * up product.
      add_norm: raw, stream [R, N], the product's scales [R], [N], a norm's weight [N]: the RMSNorm,
        with `eps`, of stream + product. The sum is the first result, in bfloat16.
    """
    count = threads(columns)
    assert count is not None
    pieces, warps = columns // _EACH // count, count // WARP
    ctas = min(rows, compat.sm_count() * (512 // count))
    summed = kind == "add_norm"

    def run(_: Any, *refs: Value) -> None:
        # With a sum: raw, stream and weight. Without: both are raw, and have scales.
        *given, row_scale, scale, other, rest = *map(address, refs[:5]), refs[5:]
        column_scales = [scale] if summed else [scale, other]
        total_out, (values, scales, scratch) = None, map(address, rest[-3:])
        if summed:
            total_out = address(rest[0])
        element, single = ir.BF16Type.get(), ir.F32Type.get()
        vectors = ir.VectorType.get((_EACH,), single)
        block, thread = index_x(gpu.block_id), index_x(gpu.thread_id)
        places = [add(thread, i32(count * i)) for i in range(pieces)]

        def piece_of(row: Value, at: Value) -> Value:
            return add(mul(row, i32(columns // _EACH)), at)

        def load_row(row: Value) -> list[Value]:
            ats = [piece_of(row, at) for at in places]
            words = [word for at in ats for x in given for word in load(offset(x, at, PIECE))]
            of_row = asm("ld.global.b32 $0, [$1];", offset(row_scale, row, 4), result=single)
            return [*words, of_row]

        def column_scale(scale: Value, at: Value, of_row: Value) -> Value:
            halves = [add(add(at, at), i32(h)) for h in (0, 1)]
            words = [word for h in halves for word in load(offset(scale, h, PIECE))]
            packed = vector.from_elements(ir.VectorType.get((_EACH,), word_type()), words)
            return arith.mulf(vector.bitcast(vectors, packed), vector.broadcast(vectors, of_row))

        def make(row: Value, words: list[Value], of_row: Value, to: Value) -> None:
            inputs = []
            for i, at in enumerate(places):
                first, second = (words[WORDS * k : WORDS * (k + 1)] for k in (2 * i, 2 * i + 1))
                of_piece = [unpack(first, element), unpack(second, element)]
                for k, by_column in enumerate(column_scales):
                    of_piece[k] = arith.mulf(of_piece[k], column_scale(by_column, at, of_row))
                inputs.append(of_piece)
            if not summed:
                made = [silu(*of_piece) for of_piece in inputs]
            else:
                made = []
                for (product, stream), at in zip(inputs, places, strict=True):
                    rounded = unpack(pack(product, element), element)
                    total = pack(arith.addf(rounded, stream), element)
                    store(offset(total_out, piece_of(row, at), PIECE), total)
                    made.append(unpack(total, element))
                squares = [x for piece in made for x in parts(arith.mulf(piece, piece))]
                square = over_cta(arith.addf, reduce(arith.addf, squares), to, warps)
                mean = arith.mulf(square, constant(1 / columns))
                factor = math.rsqrt(arith.addf(mean, constant(eps)))
                factor = vector.broadcast(vectors, factor)
                weights = (unpack(load(offset(other, at, PIECE)), element) for at in places)
                made = [
                    arith.mulf(arith.mulf(piece, factor), by)
                    for piece, by in zip(made, weights, strict=True)
                ]
            elements = [parts(piece) for piece in made]
            most = reduce(arith.maximumf, (math.absf(x) for piece in elements for x in piece))
            most = over_cta(arith.maximumf, most, offset(to, i32(1), 4 * warps), warps)
            # As `scaled.factors`.
            scale = arith.mulf(most, constant(1 / LARGEST))
            small = arith.cmpf(arith.CmpFPredicate.OLT, scale, constant(np.finfo(np.float32).tiny))
            scale = arith.select(small, constant(1.0), scale)
            inverse = arith.divf(constant(1.0), scale)
            first = equal(thread, 0)
            asm("st.global.b32 [$0], $1;", offset(scales, row, 4), scale, predicate=first)
            for piece, at in zip(elements, places, strict=True):
                divided = [arith.mulf(x, inverse) for x in piece]
                low, high = (asm(_TO_FP8, *divided[i : i + 4], result=word_type()) for i in (0, 4))
                target = offset(values, piece_of(row, at), PIECE // 2)
                asm("st.global.v2.b32 [$0], {$1, $2};", target, low, high)

        # Places in shared memory in turn, so that a CTA waits once for each sum or maximum.
        loop = scf.ForOp(block, i32(rows), i32(ctas), [i32(0), *load_row(block)])
        with ir.InsertionPoint(loop.body):
            row, (turn, *held) = loop.induction_variable, loop.inner_iter_args
            following = load_row(arith.minsi(add(row, i32(ctas)), i32(rows - 1)))
            of_row = held.pop()
            make(row, held, of_row, offset(scratch, turn, 2 * warps * 4))
            scf.yield_([arith.xori(turn, i32(1)), *following])

    def rows_to_fp8(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(run)(*refs)

    sums = [jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)] * summed
    return plgpu.kernel(
        rows_to_fp8,
        out_type=[
            *sums,
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((4 * warps,), jnp.float32)],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=count // WARPGROUP,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def constant(value: Any) -> Value:
    return utils.c(float(value), ir.F32Type.get())


def parts(values: Value) -> list[Value]:
    """Returns the elements of a vector."""
    return [vector.extract(values, [], [i]) for i in range(ir.VectorType(values.type).shape[0])]


def silu(gate: Value, up: Value) -> Value:
    """Returns gate / (1 + exp(-gate)) * up."""
    single, kind = ir.F32Type.get(), gate.type

    def share(x: Value) -> Value:
        power = arith.mulf(x, constant(-np.log2(np.e)))
        power = asm("ex2.approx.ftz.f32 $0, $1;", power, result=single)
        total = arith.addf(power, constant(1.0))
        return asm("rcp.approx.ftz.f32 $0, $1;", total, result=single)

    shares = vector.from_elements(kind, [share(x) for x in parts(gate)])
    return arith.mulf(arith.mulf(gate, shares), up)
