"""MLIR and PTX for kernels that know the memory by its addresses: words, vectors, loads, stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from jax.experimental.mosaic.gpu import utils as _utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector
from jaxlib.mlir.dialects import scf as _scf

# Their types differ between the versions of jax that mypy checks.
utils: Any = _utils
scf: Any = _scf
Value = Any
add, mul = arith.addi, arith.muli

WARP, WARPGROUP = 32, 128
WORDS, PIECE = 4, 16  # a piece, what a thread handles, is four words of 4 bytes


def word_type() -> Any:
    return ir.IntegerType.get_signless(32)


def i32(value: int) -> Value:
    return utils.c(value, word_type())


def index_x(read: Callable[[Any], Value]) -> Value:
    """Returns `gpu.thread_id` or `gpu.block_id` along x."""
    return arith.index_cast(word_type(), read(gpu.Dimension.x))


def equal(value: Value, constant: int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.eq, value, i32(constant))


def negate(condition: Value) -> Value:
    return arith.xori(condition, utils.c(1, ir.IntegerType.get_signless(1)))


def address(ref: Value) -> Value:
    """Returns the address of a reference's first element."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def offset(start: Value, index: Value, size: int) -> Value:
    """Returns start + index * size, in bytes."""
    wide = arith.extui(start.type, index)
    return add(start, mul(wide, utils.c(size, start.type)))


def choose(
    condition: Value, then: Callable[[], Sequence[Value]], other: Callable[[], Sequence[Value]]
) -> list[Value]:
    """Returns the words of one branch; the other does not run."""
    branch = scf.IfOp(condition, [word_type()] * WORDS, has_else=True)
    for block, make in ((branch.then_block, then), (branch.else_block, other)):
        with ir.InsertionPoint(block):
            scf.yield_(list(make()))
    return list(branch.results)


def asm(text: str, *arguments: Value, result: Any = None, predicate: Value | None = None) -> Any:
    """Runs PTX and returns its results; with a predicate only where it holds."""
    if result is None:
        return utils.inline_ptx(text, *arguments, predicate=predicate)
    # Side effects keep its order among the others.
    return utils.inline_ptx(text, *arguments, result_types=result, has_side_effects=True)


def load(at: Value, kind: str = "") -> Sequence[Value]:
    text = f"ld{kind}.global.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    return asm(text, at, result=[word_type()] * WORDS)


def load_address(at: Value) -> Value:
    return asm("ld.global.b64 $0, [$1];", at, result=ir.IntegerType.get_signless(64))


def store(at: Value, words: Sequence[Value], kind: str = "") -> None:
    asm(f"st{kind}.global.v4.b32 [$0], {{$1, $2, $3, $4}};", at, *words)


def unpack(words: Sequence[Value], element: Any) -> Value:
    """Returns the elements in the words as a vector of float32."""
    packed = vector.from_elements(ir.VectorType.get((len(words),), word_type()), list(words))
    count = 32 * len(words) // utils.bitwidth(element)
    values = vector.bitcast(ir.VectorType.get((count,), element), packed)
    single = ir.F32Type.get()
    return values if element == single else arith.extf(ir.VectorType.get((count,), single), values)


def pack(values: Value, element: Any) -> list[Value]:
    """Rounds a vector of float32 to the element type, and returns it as words."""
    count = ir.VectorType(values.type).shape[0]
    if element != ir.F32Type.get():
        values = arith.truncf(ir.VectorType.get((count,), element), values)
    words = count * utils.bitwidth(element) // 32
    packed = vector.bitcast(ir.VectorType.get((words,), word_type()), values)
    return [vector.extract(packed, [], [i]) for i in range(words)]


def over_cta(combine: Callable[[Value, Value], Value], value: Value, to: Value, warps: int) -> Any:
    """Combines a float32 of every thread of the CTA, which waits for all.

    to: the address in shared memory of a float32 for each warp.
    """
    for distance in (16, 8, 4, 2, 1):
        value = combine(value, utils.shfl_bfly(value, distance))
    thread = index_x(gpu.thread_id)
    warp = arith.divui(thread, i32(WARP))
    first = equal(arith.remui(thread, i32(WARP)), 0)
    asm("st.shared.b32 [$0], $1;", offset(to, warp, 4), value, predicate=first)
    gpu.barrier()
    single = ir.F32Type.get()
    places = (offset(to, i32(i), 4) if i else to for i in range(warps))
    return reduce(combine, (asm("ld.shared.b32 $0, [$1];", x, result=single) for x in places))
