"""The kernel's body for sums over a few devices of one host: every device writes to all others.

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
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, scf, vector

from pallas_kernels.exchange import EMPTY, HEADER

WARPGROUP, WORDS = 128, 4  # threads; words of 4 bytes that a thread moves at once
PATIENCE = 1 << 26  # polls until the kernel ends with an error, the better part of a minute


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
    -> sum [rows, columns], with a weight also the sum's RMSNorm, in dtype.

    The sum is made in float32 in the order of the devices and rounded, then the residual is added.
    capacity: bytes that one device may send. eps: of the norm, which is only made where it is
    given; then a block of threads makes a row.
    """
    element_bytes = jnp.dtype(dtype).itemsize
    in_row = columns * element_bytes // (4 * WORDS)
    groups = 1 if eps is None else in_row // WARPGROUP
    threads = groups * WARPGROUP
    count = rows * in_row
    blocks = -(-count // threads)

    def exchange(_, *refs):
        inputs = [_address(ref) for ref in refs[: 2 + residual + (eps is not None)]]
        parts, *more, table = inputs
        outs = [_address(ref) for ref in refs[len(inputs) :][: 1 + (eps is not None)]]
        element = utils.dtype_to_ir_type(jnp.dtype(dtype))
        thread = _index(gpu.thread_id)
        place = arith.addi(arith.muli(_index(gpu.block_id), _i32(threads)), thread)
        exists = arith.cmpi(arith.CmpIPredicate.slt, place, _i32(count))
        zeros = [_i32(0)] * WORDS
        loaded = _if(exists, lambda: _load(_ahead(parts, place, 16)), zeros)
        rank = _load_word(table)
        homes = [_load_address(_ahead(table, _i32(1 + i), 8)) for i in range(devices)]
        own = homes[0]
        for device in range(1, devices):
            own = arith.select(_equal(rank, device), homes[device], own)
        epoch = _load_word(own)
        before, weight = None, None
        if residual:
            before = _if(exists, lambda: _load(_ahead(more[0], place, 16)), zeros)
        if eps is not None:
            weight = _load(_ahead(more[-1], thread, 16))
        sent = [_safe(word) for word in loaded]
        taken = arith.muli(arith.andi(epoch, _i32(1)), _i32(devices * capacity))
        first = arith.addi(taken, _i32(HEADER))

        def box(home, sender):
            """Where the thread's words from `sender` lie in the memory of `home`."""
            offset = arith.addi(first, arith.muli(sender, _i32(capacity)))
            return _ahead(_ahead(home, offset, 1), place, 16)

        for device in range(devices):
            other = arith.andi(exists, arith.xori(_equal(rank, device), _true()))
            target = box(homes[device], rank)
            _if(other, lambda at=target: _store_shared(at, sent))
        gpu.barrier()  # every thread of the block has read the epoch
        _if(_equal(thread, 0), lambda: _count_block(own, epoch, blocks))

        total = None
        for device in range(devices):
            source, mine = box(own, _i32(device)), _equal(rank, device)
            # Where a thread has nothing to do it has nothing to wait for.
            here = arith.ori(mine, arith.xori(exists, _true()))
            came = _if(here, lambda: sent, lambda at=source: _arrived(at))
            part = _wide(came, element)
            total = part if total is None else arith.addf(total, part)
        if before is not None:
            total = arith.addf(_wide(_narrow(total, element), element), _wide(before, element))
        words = _narrow(total, element)
        _if(exists, lambda: _store(_ahead(outs[0], place, 16), words))
        if eps is not None:
            scale = _norm_scale(_wide(words, element), columns, eps, _address(refs[-1]), groups)
            scaled = _narrow(arith.mulf(_wide(words, element), scale), element)
            made = arith.mulf(_wide(scaled, element), _wide(weight, element))
            _store(_ahead(outs[1], place, 16), _narrow(made, element))

    def sum_over_devices(*refs):
        plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))(exchange)(*refs)

    result = jax.ShapeDtypeStruct((rows, columns), dtype)
    return plgpu.kernel(
        sum_over_devices,
        out_type=[result] * (1 if eps is None else 2),
        scratch_types=[] if eps is None else [plgpu.SMEM((32,), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i32(value: int) -> ir.Value:
    return utils.c(value, _word())


def _true() -> ir.Value:
    return utils.c(1, ir.IntegerType.get_signless(1))


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def _index(of: Callable[[Any], ir.Value]) -> ir.Value:
    return arith.index_cast(_word(), of(gpu.Dimension.x))


def _equal(value: ir.Value, constant: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, value, _i32(constant))


def _ahead(address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    """The address of the index-th piece of so many bytes."""
    wide = arith.extui(address.type, index)
    return arith.addi(address, arith.muli(wide, utils.c(size, address.type)))


def _if(
    condition: ir.Value,
    then: Callable[[], Sequence[ir.Value] | None],
    other: Callable[[], Sequence[ir.Value]] | Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """What the branch that is taken makes: words, or nothing."""
    types = [_word()] * (WORDS if other else 0)
    branch = scf.IfOp(condition, types, has_else=bool(other))
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(list(then() or ()))
    if other:
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(other() if callable(other) else other))
    return list(branch.results)


def _load(address: ir.Value) -> tuple[ir.Value, ...]:
    text = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    return utils.inline_ptx(text, address, result_types=[_word()] * WORDS, has_side_effects=True)


def _load_word(address: ir.Value) -> ir.Value:
    text = "ld.relaxed.gpu.global.b32 $0, [$1];"
    return utils.inline_ptx(text, address, result_types=_word(), has_side_effects=True)


def _load_address(address: ir.Value) -> ir.Value:
    text = "ld.global.b64 $0, [$1];"
    kind = ir.IntegerType.get_signless(64)
    return utils.inline_ptx(text, address, result_types=kind, has_side_effects=True)


def _store(address: ir.Value, words: Sequence[ir.Value]) -> None:
    utils.inline_ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", address, *words)


def _store_shared(address: ir.Value, words: Sequence[ir.Value]) -> None:
    utils.inline_ptx("st.relaxed.sys.global.v4.b32 [$0], {$1, $2, $3, $4};", address, *words)


def _is_empty(word: ir.Value) -> ir.Value:
    return _equal(word, EMPTY - (1 << 32))


def _safe(word: ir.Value) -> ir.Value:
    """The word, zero if it is the one that stands for none."""
    return arith.select(_is_empty(word), _i32(0), word)


def _arrived(address: ir.Value) -> list[ir.Value]:
    """Polls until all words are there, and empties their place."""
    text = "ld.relaxed.sys.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    loop = scf.WhileOp([_word()] * (WORDS + 1), [_i32(0)])
    with ir.InsertionPoint(loop.before.blocks.append(_word())) as point:
        polls = point.block.arguments[0]
        words = utils.inline_ptx(
            text, address, result_types=[_word()] * WORDS, has_side_effects=True
        )
        missing = _is_empty(words[0])
        for word in words[1:]:
            missing = arith.ori(missing, _is_empty(word))
        utils.inline_ptx("trap;", predicate=_equal(polls, PATIENCE))
        scf.condition(missing, [arith.addi(polls, _i32(1)), *words])
    with ir.InsertionPoint(loop.after.blocks.append(*[_word()] * (WORDS + 1))) as point:
        scf.yield_([point.block.arguments[0]])
    _store_shared(address, [_i32(EMPTY - (1 << 32))] * WORDS)
    return list(loop.results)[1:]


def _count_block(own: ir.Value, epoch: ir.Value, blocks: int) -> None:
    """One thread of each block is here; the last of them starts the next epoch."""
    text = "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;"
    before = utils.inline_ptx(
        text, _ahead(own, _i32(1), 4), _i32(blocks - 1), result_types=_word(),
        has_side_effects=True,
    )  # fmt: skip
    utils.inline_ptx(
        "st.relaxed.gpu.global.b32 [$0], $1;", own, arith.addi(epoch, _i32(1)),
        predicate=_equal(before, blocks - 1),
    )  # fmt: skip


def _vector(words: Sequence[ir.Value], element: ir.Type) -> ir.Value:
    made = vector.from_elements(ir.VectorType.get((len(words),), _word()), list(words))
    count = 32 * len(words) // utils.bitwidth(element)
    return vector.bitcast(ir.VectorType.get((count,), element), made)


def _wide(words: Sequence[ir.Value], element: ir.Type) -> ir.Value:
    """As float32."""
    made = _vector(words, element)
    if element == ir.F32Type.get():
        return made
    count = ir.VectorType(made.type).shape[0]
    return arith.extf(ir.VectorType.get((count,), ir.F32Type.get()), made)


def _narrow(values: ir.Value, element: ir.Type) -> list[ir.Value]:
    """float32 values rounded to the element's type, as words."""
    count = ir.VectorType(values.type).shape[0]
    if element != ir.F32Type.get():
        values = arith.truncf(ir.VectorType.get((count,), element), values)
    words = count * utils.bitwidth(element) // 32
    made = vector.bitcast(ir.VectorType.get((words,), _word()), values)
    return [vector.extract(made, [], [i]) for i in range(words)]


def _norm_scale(
    values: ir.Value, columns: int, eps: float, scratch: ir.Value, groups: int
) -> ir.Value:
    """1 / sqrt(mean of squares + eps) of the block's row, for each of the thread's values."""
    single = ir.F32Type.get()
    count = ir.VectorType(values.type).shape[0]
    squares = arith.mulf(values, values)
    total = vector.extract(squares, [], [0])
    for i in range(1, count):
        total = arith.addf(total, vector.extract(squares, [], [i]))
    for step in (16, 8, 4, 2, 1):
        total = arith.addf(total, utils.shfl_bfly(total, step))
    thread = _index(gpu.thread_id)
    lane, warp = arith.andi(thread, _i32(31)), arith.shrui(thread, _i32(5))
    warps = groups * WARPGROUP // 32
    utils.inline_ptx(
        "st.shared.b32 [$0], $1;", _ahead(scratch, warp, 4), total, predicate=_equal(lane, 0)
    )
    gpu.barrier()
    total = None
    for i in range(warps):
        part = utils.inline_ptx(
            "ld.shared.b32 $0, [$1];", _ahead(scratch, _i32(i), 4), result_types=single,
            has_side_effects=True,
        )  # fmt: skip
        total = part if total is None else arith.addf(total, part)
    mean = arith.divf(total, utils.c(float(columns), single))
    root = math.rsqrt(arith.addf(mean, utils.c(eps, single)))
    return vector.broadcast(values.type, root)
