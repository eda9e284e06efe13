"""Broken PyTorch .bin files: the archive, the pickle in it byte by byte and instruction by
instruction, programs in the pickle's place, and the storages.

What loads is compared with PyTorch's own reading (weights_only).
"""

from __future__ import annotations

import collections
import io
import pickletools
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from campaigns.kind import Kind, require
from campaigns.mutate import NUMBERS, TEXTS, mutated_bytes
from convert.shards import FLOATS, SourceTensor
from convert.torch_file import open_bin
from convert.values import materialize
from pdllm_jax.storage.checkpoint import CheckpointError

GLOBALS = (
    b"os\nsystem", b"posix\nsystem", b"builtins\neval", b"builtins\nexec", b"builtins\nbytearray",
    b"builtins\ngetattr", b"subprocess\nPopen", b"torch\nload", b"torch.hub\nload", b"os\nmkdir",
    b"torch._utils\n_rebuild_sparse_tensor", b"torch._utils\n_rebuild_qtensor",
    b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch._utils\n_rebuild_tensor_v3",
    b"torch._utils\n_rebuild_parameter", b"torch._utils\n_rebuild_tensor", b"torch\nTensor",
    b"torch\nDoubleStorage", b"torch\nHalfStorage", b"torch\nLongStorage", b"torch\nBoolStorage",
    b"torch.storage\nUntypedStorage", b"collections\nOrderedDict", b"collections\nCounter", b"\n",
    b"torch\nSize", b"torch\nfloat32", b"torch._tensor\n_rebuild_from_type_v2", b"\xff\n", b"a\n\0",
)  # fmt: skip
# Instructions that a writer of state dicts would not give.
SNIPPETS = (
    b")q\0" + b"h\0\x86q\0" * 60,  # a nest of 2**60 tuples, to be hashed, compared or printed
    b"]q\0h\0a", b"}q\0X\1\0\0\0ah\0s",  # a list and a dict that hold themselves
    b"(" * 500, b"\x85" * 500, b"]" * 500, b"\x8a\xff" + b"\x7f" * 255, b"J\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f", b"X\1\0\0\0\xff", b"X\3\0\0\0\xed\xa0\x80", b"\x80\4", b"\x80\2", b".",
    b"0", b"2", b"R", b"b", b"\x81", b"Q", b"s", b"u", b"a", b"e", b"t", b"\x85", b"N", b"\x88",
    b"cos\nmkdir\nX\x15\0\0\0../outside/was-made\0\0\0\x85R",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff",
    b"G\x7f\xf8\0\0\0\0\0\0", b"cbuiltins\neval\nX\5\0\0\0" + b"1+1\0\0\x85R",
)  # fmt: skip
Records = list[tuple[str, bytes]]


class TorchFile(Kind):
    """A file of torch.save with eight tensors: views, a parameter, one storage of two."""

    name = "bin"
    refusals = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        import torch

        super().__init__(folder)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        shared = normal(10)
        values = collections.OrderedDict(
            {
                "model.a": normal(3, 4), "bfloat16": normal(6).bfloat16(),
                "scalar": normal().half(), "ints": torch.arange(5), "transposed": normal(4, 3).T,
                "first": shared[:4], "second": shared[2:8:2],
                "parameter": torch.nn.Parameter(shared),
            }
        )  # fmt: skip
        values._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
        self.path = folder / "pytorch_model.bin"
        torch.save(values, self.path)
        self.content = self.path.read_bytes()
        with zipfile.ZipFile(self.path) as archive:
            self.good: Records = [(name, archive.read(name)) for name in archive.namelist()]
        self.index = next(i for i, row in enumerate(self.good) if row[0].endswith("/data.pkl"))

    def write(self, rng: Random) -> None:
        kind = rng.randrange(10)
        records = list(self.good)
        name, pickle = records[self.index]
        if kind == 0:
            self.content = mutated_bytes(rng, self.path_content(records))
        elif kind == 1:
            at = rng.randrange(len(records))
            records[at] = records[at][0], mutated_bytes(rng, records[at][1])
            self.content = self.path_content(records)
        elif kind == 2:
            self.content = _another_archive(rng, records)
        elif kind == 3:
            self.content = _another_header(rng, self.path_content(records))
        elif kind == 4:
            records[self.index] = name, mutated_bytes(rng, pickle)
            self.content = self.path_content(records)
        else:
            records[self.index] = name, _another_program(rng, pickle)
            self.content = self.path_content(records)
        self.path.write_bytes(self.content)

    @staticmethod
    def path_content(records: Records, **options: Any) -> bytes:
        """The archive as PyTorch would write it, but for the alignment."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, content in records:
                archive.writestr(name, content)
        return file.getvalue()

    def load(self) -> list[tuple[SourceTensor, np.ndarray | None]]:
        return [
            (tensor, materialize(tensor, tensor.dtype) if tensor.dtype in FLOATS else None)
            for tensor in open_bin(self.path)
        ]

    def check(self, loaded: list[tuple[SourceTensor, np.ndarray | None]]) -> None:
        import torch

        def read(content: bytes) -> Any:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

        try:
            theirs = read(self.content)
        except (RuntimeError, ValueError):
            # It also reads what says nothing about tensors: the number of the disk, alignment.
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                kept = ("data", "data.pkl", "byteorder", "version")
                names = [name for name in archive.namelist() if name.split("/")[1] in kept]
                theirs = read(self.path_content([(name, archive.read(name)) for name in names]))
        require(list(theirs) == [tensor.name for tensor, _ in loaded], "other tensors")
        dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
        for tensor, values in loaded:
            found = theirs[tensor.name].detach()
            require(tuple(found.shape) == tensor.shape, f"shape of {tensor.name!r}")
            require(
                dtypes.get(found.dtype) == (tensor.dtype if values is not None else None), "dtype"
            )
            if values is not None:
                raw = torch.empty(found.numel(), dtype=found.dtype).copy_(found.reshape(-1))
                raw = raw.view(torch.uint8).numpy()
                require(raw.tobytes() == values.tobytes(), f"values of {tensor.name!r}")


def _another_archive(rng: Random, records: Records) -> bytes:
    """Entries that are compressed, twice, absent, elsewhere, longer; bytes before and behind."""
    kind, at = rng.randrange(9), rng.randrange(len(records))
    name, content = records[at]
    if kind == 0:
        return TorchFile.path_content(records, compression=zipfile.ZIP_DEFLATED)
    if kind == 1:
        records.insert(rng.randrange(len(records)), (name, content[::-1]))
    elif kind == 2:
        del records[at]
    elif kind == 3:
        records[at] = rng.choice(("elsewhere/", "", "../", "/", name + "/")) + name, content
    elif kind == 4:
        records[at] = name, content + bytes(rng.choice((1, 4, 64)))
    elif kind == 5:
        records.insert(0, ("pytorch_model/" + rng.choice(TEXTS)[:60].replace("\ud800", ""), b""))
    elif kind == 6:
        other = rng.randrange(len(records))
        records[at], records[other] = (name, records[other][1]), (records[other][0], content)
    elif kind == 7:
        return rng.randbytes(rng.choice((1, 64))) + TorchFile.path_content(records)
    else:
        # Another archive's end behind the first one's: which of the two is read?
        return TorchFile.path_content(records) + TorchFile.path_content(records[:at])
    return TorchFile.path_content(records)


def _another_header(rng: Random, content: bytes) -> bytes:
    """One field of the archive's headers changed."""
    signature, fields = rng.choice(
        (
            (b"PK\3\4", ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            (
                b"PK\1\2",
                ((8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4)),
            ),
            (b"PK\5\6", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
    )
    at = -1
    for _ in range(rng.randrange(1, 6)):
        found = content.find(signature, at + 1)
        at = found if found >= 0 else at
    offset, size = rng.choice(fields)
    place = slice(at + offset, at + offset + size)
    old = int.from_bytes(content[place], "little")
    limit = 256**size
    new = rng.choice(
        (0, 1, 8, limit - 1, old ^ 1, old + 1, old - 1, old + 16, rng.randrange(limit))
    )
    out = bytearray(content)
    out[place] = (new % limit).to_bytes(size, "little")
    return bytes(out)


def _another_program(rng: Random, pickle: bytes) -> bytes:
    """Instructions exchanged, left out, repeated, or put in; and their arguments changed."""
    starts = [at for _, _, at in pickletools.genops(pickle)]
    steps = [pickle[a:b] for a, b in zip(starts, [*starts[1:], len(pickle)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
        kind = rng.randrange(8)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 2:
            steps.insert(at, steps[other])
        elif kind == 3:
            steps.insert(at, rng.choice(SNIPPETS))
        else:
            # Numbers, names and globals, which few instructions have.
            places = [i for i, step in enumerate(steps) if step[:1] in b"KMJ\x8aXc"]
            if places:
                at = rng.choice(places)
                steps[at] = _another_argument(rng, steps[at])
    return b"".join(steps)


def _another_argument(rng: Random, step: bytes) -> bytes:
    if step[:1] == b"c":
        return b"c" + rng.choice(GLOBALS) + b"\n"
    if step[:1] == b"X":
        text = rng.choice((*TEXTS, "0", "1", "2", "7", "storage", "cpu", "cuda:0", "meta"))
        content = text.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(content)) + content
    number = rng.choice([x for x in NUMBERS if type(x) is int] + [3, 4, 5, 6, 10, 12])
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


KINDS = (TorchFile,)
