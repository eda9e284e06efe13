"""data.pkl of a PyTorch file: which tensors there are, found without unpickling.

A pickle is a program, and whoever runs one runs what its author wanted. Here its instructions are
followed over inert values: the few that a dict of tensors is made of. Nothing is imported, called
or built that a pickle names. PyTorch's own restricted reader keeps strangers' code out too, but 200
bytes can have it hash a nest of tuples for ever, or ask for any memory.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
from collections.abc import Mapping
from typing import Any, NoReturn

from convert.shards import MAX_RANK

# Of the index, and of the archive's list of files. A tensor takes some 300 bytes; 4 MiB of
# instructions can ask for some 300 MB of memory, and for seconds.
MAX_INDEX_BYTES = 4 << 20
_PROTOCOL = 2  # torch.save's, and the only one that PyTorch's restricted reader is sure to read

# dtype's name here, bytes of an element.
_STORAGES = {
    "torch BFloat16Storage": ("BF16", 2), "torch HalfStorage": ("F16", 2),
    "torch FloatStorage": ("F32", 4), "torch DoubleStorage": ("F64", 8),
    "torch LongStorage": ("I64", 8), "torch IntStorage": ("I32", 4),
    "torch ShortStorage": ("I16", 2), "torch CharStorage": ("I8", 1),
    "torch ByteStorage": ("U8", 1), "torch BoolStorage": ("BOOL", 1),
    "torch ComplexFloatStorage": ("C64", 8), "torch ComplexDoubleStorage": ("C128", 16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Record:
    """A file of the archive: its bytes lie in the .bin from `begin` on."""

    begin: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    """One-dimensional; size in elements, begin in bytes of the file."""

    dtype: str
    itemsize: int
    size: int
    begin: int


@dataclasses.dataclass(frozen=True)
class StridedTensor:
    """shape and strides in elements; begin: the byte of its first element."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int

    @property
    def span(self) -> int:
        """Elements of the storage from its first one to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * by for n, by in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        after = 1
        for n, by in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and by != after:
                return 0 in self.shape
            after *= n
        return True


class BrokenFileError(Exception):
    """What a file of weights does not hold, or what contradicts itself."""


def refuse(message: str) -> NoReturn:
    raise BrokenFileError(message)


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle would import; here its name alone."""

    name: str


class _Mark:
    """Of a pickle's stack: where the items of a container begin."""


class Interpreter:
    """Follows a pickle's instructions over numbers, text, tuples, lists, dicts and tensors.

    Keys are numbers and text, so that nothing is hashed or compared that could be deep.
    """

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """What is on the stack at the end."""
        stream = io.BytesIO(pickle)
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name != "STOP":
                    self._follow(opcode.name, argument)
        except ValueError as error:
            refuse(f"an index that is no pickle ({error!s:.99})")
        except (IndexError, KeyError):
            refuse("an index that takes what is not there")
        if len(self._stack) != 1 or stream.read(1):
            refuse("an index that goes on behind its end")
        return self._pop()

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("BINPUT", "LONG_BINPUT"):
            if type(stack[-1]) is _Mark:
                refuse("an index whose marks do not match")
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([self._pop() for _ in range(int(name[-1]))])))
        elif name in ("APPEND", "APPENDS"):
            items = [self._pop()] if name == "APPEND" else self._marked()
            self._target(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._marked()
            if len(items) % 2:
                refuse("a key without a value")
            target = self._target(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) not in (str, int):
                    refuse(f"{kind_of(key)} as a key")
                target[key] = value
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            arguments, function = self._pop(), self._pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            # Attributes of an OrderedDict: _metadata, versions of modules.
            if type(self._pop()) is not dict:
                refuse("attributes that are no dict")
            self._target(dict)
        elif name == "PROTO":
            if argument != _PROTOCOL:
                refuse(f"protocol {argument}, not {_PROTOCOL}")
        else:
            refuse(f"the instruction {name}")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if type(value) is _Mark:
            refuse("an index whose marks do not match")
        return value

    def _marked(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if type(self._stack[at]) is _Mark:
                items = self._stack[at + 1 :]
                del self._stack[at:]
                return items
        refuse("an index whose marks do not match")

    def _target(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            refuse(f"{kind_of(self._stack[-1])} where a {kind.__name__} should be")
        return self._stack[-1]

    def _call(self, function: Any, arguments: Any) -> Any:
        """Makes what a dict of tensors is made of."""
        if type(function) is not _Name or type(arguments) is not tuple:
            refuse(f"a call of {kind_of(function)}")
        name, count = function.name, len(arguments)
        if name == "collections OrderedDict" and not count:
            return {}
        if name == "torch._utils _rebuild_tensor_v2" and count in (6, 7):
            if count == 7 and arguments[6] not in (None, {}):
                refuse("a tensor that is conjugated or negated")
            return self._tensor(*arguments[:5])
        if name == "torch._utils _rebuild_parameter" and count == 3:
            if type(arguments[0]) is not StridedTensor or type(arguments[1]) is not bool:
                refuse(f"a parameter of {kind_of(arguments[0])}")
            return arguments[0]
        refuse(f"a call of {kind_of(function)}")

    def _storage(self, pid: Any) -> _Storage:
        """A persistent id: ("storage", class, key, device, elements)."""
        if type(pid) is not tuple or len(pid) != 5 or type(pid[1]) is not _Name:
            refuse("a reference that is no storage's")
        kind, (_, storage, key, device, size) = pid[0], pid
        if kind != "storage" or type(key) is not str or type(device) is not str:
            refuse("a reference that is no storage's")
        if storage.name not in _STORAGES:
            refuse(f"a storage of {storage.name!r:.99}")
        dtype, itemsize = _STORAGES[storage.name]
        if f"data/{key}" not in self._records:
            refuse(f"no storage {key!r:.99}")
        record = self._records[f"data/{key}"]
        if type(size) is not int or size * itemsize != record.nbytes:
            refuse(f"{size!r:.99} elements of {dtype} in {record.nbytes} bytes")
        return _Storage(dtype, itemsize, size, record.begin)

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any
    ) -> StridedTensor:
        if type(storage) is not _Storage or type(requires_grad) is not bool:
            refuse("a tensor without a storage")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            refuse("a tensor without sizes")
        if len(shape) > MAX_RANK:
            refuse(f"a tensor of {len(shape)} dimensions")
        if any(type(size) is not int or size < 0 for size in (offset, *shape, *strides)):
            refuse("a tensor with sizes that are none")
        begin = storage.begin + offset * storage.itemsize
        tensor = StridedTensor(storage.dtype, shape, strides, begin)
        # One that repeats its elements could be of any size.
        if offset + tensor.span > storage.size or math.prod(shape) > storage.size:
            refuse(f"a tensor {list(shape)!r:.200} of {storage.size} elements")
        return tensor


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}


def kind_of(value: Any) -> str:
    """In words, for messages."""
    if type(value) is _Name:
        return f"{value.name!r:.99}"
    names: dict[type, str] = {StridedTensor: "tensor", _Storage: "storage", _Mark: "mark"}
    return f"a {names.get(type(value), type(value).__name__)}"
