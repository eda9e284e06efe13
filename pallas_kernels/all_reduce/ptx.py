"""What a thread of a kernel does with memory by the address, in pieces of four words of 4 bytes.

Pallas has references, whose home is the kernel's own device; the addresses of other devices' memory
are numbers. All of this is traced, in the middle of a kernel with lane semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as _utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector
from jaxlib.mlir.dialects import scf as _scf

# Their types differ between the versions of jax that the types are checked on.
utils: Any = _utils
scf: Any = _scf
Value = Any

WORDS = 4
PIECE = 4 * WORDS  # bytes


def word_type() -> Any:
    return ir.IntegerType.get_signless(32)


def i32(value: int) -> Value:
    return utils.c(value, word_type())


def f32(value: float) -> Value:
    return utils.c(value, ir.F32Type.get())


def index(of: Callable[[Any], Value]) -> Value:
    """`gpu.thread_id` or `gpu.block_id`, along x."""
    return arith.index_cast(word_type(), of(gpu.Dimension.x))


def equal(value: Value, constant: int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.eq, value, i32(constant))


def negate(condition: Value) -> Value:
    return arith.xori(condition, utils.c(1, ir.IntegerType.get_signless(1)))


def address(ref: Value) -> Value:
    """Of a reference's first element."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def ahead(start: Value, place: Value, size: int) -> Value:
    """The address of the place-th piece of so many bytes."""
    wide = arith.extui(start.type, place)
    return arith.addi(start, arith.muli(wide, utils.c(size, start.type)))


def when(condition: Value, then: Callable[[], Any]) -> None:
    """Does something where the condition holds."""
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        then()
        scf.yield_([])


def choose(
    condition: Value, then: Callable[[], Sequence[Value]], other: Callable[[], Sequence[Value]]
) -> list[Value]:
    """The words that one branch makes; the other isn't taken."""
    branch = scf.IfOp(condition, [word_type()] * WORDS, has_else=True)
    for block, make in ((branch.then_block, then), (branch.else_block, other)):
        with ir.InsertionPoint(block):
            scf.yield_(list(make()))
    return list(branch.results)


def _ptx(text: str, *arguments: Value, made: Any = None, **more: Any) -> Any:
    if made is not None:
        more["has_side_effects"] = True  # keeps its place among the others
    return utils.inline_ptx(text, *arguments, result_types=made, **more)


def load(at: Value, kind: str = "") -> Sequence[Value]:
    """A piece. kind: ".relaxed.sys" for one that another device writes to."""
    text = f"ld{kind}.global.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    return _ptx(text, at, made=[word_type()] * WORDS)


def store(at: Value, words: Sequence[Value], kind: str = "") -> None:
    """A piece. kind: ".relaxed.sys" for one that another device reads or writes to."""
    _ptx(f"st{kind}.global.v4.b32 [$0], {{$1, $2, $3, $4}};", at, *words)


def load_word(at: Value) -> Value:
    return _ptx("ld.relaxed.gpu.global.b32 $0, [$1];", at, made=word_type())


def store_word(at: Value, word: Value, predicate: Value) -> None:
    _ptx("st.relaxed.gpu.global.b32 [$0], $1;", at, word, predicate=predicate)


def load_address(at: Value) -> Value:
    return _ptx("ld.global.b64 $0, [$1];", at, made=ir.IntegerType.get_signless(64))


def load_scratch(at: Value) -> Value:
    """A float32 of shared memory."""
    return _ptx("ld.shared.b32 $0, [$1];", at, made=ir.F32Type.get())


def store_scratch(at: Value, value: Value, predicate: Value) -> None:
    _ptx("st.shared.b32 [$0], $1;", at, value, predicate=predicate)


def count_to(at: Value, last: int) -> Value:
    """Adds one to a word, or makes it 0 where it is `last`; what it was before."""
    text = "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;"
    return _ptx(text, at, i32(last), made=word_type())


def give_up(predicate: Value) -> None:
    """Ends the kernel with an error."""
    _ptx("trap;", predicate=predicate)


def widen(words: Sequence[Value], element: Any) -> Value:
    """Words as a vector of float32, from the elements that they hold."""
    made = vector.from_elements(ir.VectorType.get((len(words),), word_type()), list(words))
    count = 32 * len(words) // utils.bitwidth(element)
    made = vector.bitcast(ir.VectorType.get((count,), element), made)
    single = ir.F32Type.get()
    return made if element == single else arith.extf(ir.VectorType.get((count,), single), made)


def narrow(values: Value, element: Any) -> list[Value]:
    """A vector of float32, rounded to the elements, as words."""
    count = ir.VectorType(values.type).shape[0]
    if element != ir.F32Type.get():
        values = arith.truncf(ir.VectorType.get((count,), element), values)
    words = count * utils.bitwidth(element) // 32
    made = vector.bitcast(ir.VectorType.get((words,), word_type()), values)
    return [vector.extract(made, [], [i]) for i in range(words)]
