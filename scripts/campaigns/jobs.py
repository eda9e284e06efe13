"""Work that is killed: conversion, writing snapshots, evaluation; and what must be left of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from campaigns.kind import require


class Job:
    """Work that writes into a folder, by turns with one result and another.

    turns: of the results; one where what a killed run has left is gone on with, and not made good.
    """

    name: ClassVar[str]
    turns: ClassVar[tuple[int, ...]] = (0,)

    def __init__(self, sources: Path) -> None:
        """sources: made by `prepare`, read only."""
        self.sources = sources

    def prepare(self) -> None:
        """Makes what the work starts from; once, before anything is killed."""

    def work(self, folder: Path, turn: int) -> None:
        """What is killed."""
        raise NotImplementedError

    def expect(self, folder: Path, turn: int) -> None:
        """Takes in what an undisturbed run has left."""
        raise NotImplementedError

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        """After a kill: what is there now, in a word. before: the result that was complete."""
        raise NotImplementedError

    def check_complete(self, folder: Path, turn: int) -> None:
        """After a run that ended: AssertionError unless all is as an undisturbed run left it."""
        raise NotImplementedError

    def begin_anew(self, folder: Path) -> None:
        """Empties the folder."""
        shutil.rmtree(folder)
        folder.mkdir()


class Replacing(Job):
    """A folder that is replaced as a whole."""

    turns: ClassVar[tuple[int, ...]] = (0, 1)
    refusal: ClassVar[type[ValueError]]
    target: ClassVar[str] = "target"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        self.results: dict[int, Any] = {}

    def read(self, folder: Path) -> Any:
        """What a folder holds, comparable; raises `refusal`."""
        raise NotImplementedError

    def expect(self, folder: Path, turn: int) -> None:
        self.results[turn] = self.read(folder / self.target)

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        partial, aside = (folder / f".{self.target}.{x}" for x in ("partial", "replaced"))
        if partial.exists():
            # With all in it but the name, or refused.
            with contextlib.suppress(self.refusal):
                require(self.read(partial) == self.results[turn], "something half-written loads")
        target = folder / self.target
        if not target.exists():
            if before is None:
                return "nothing yet"
            require(aside.exists(), "what was complete is gone")
            require(self.read(aside) == self.results[before], "what was complete was changed")
            return "the old one aside"
        found = self.read(target)
        if found == self.results[turn] and turn != before:
            return "the new one"
        require(before is not None, "half of it has the name")
        require(found == self.results[before], "what was complete was changed")
        return "the old one"

    def check_complete(self, folder: Path, turn: int) -> None:
        require(self.read(folder / self.target) == self.results[turn], "another result")
        left = [path.name for path in folder.iterdir() if path.name != self.target]
        require(not left, f"left behind: {left}")


class Conversion(Replacing):
    """Converts one checkpoint over another."""

    name = "conversion"
    source: ClassVar[dict[str, str]] = {}  # what `samples.write_checkpoint` shall write

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        from pdllm_jax.storage.checkpoint import CheckpointError

        self.refusal = CheckpointError  # type: ignore[misc]

    def prepare(self) -> None:
        from campaigns import samples

        for turn in (0, 1):
            samples.write_checkpoint(
                self.sources / str(turn), shards=1 + turn, seed=turn, **self.source
            )

    def work(self, folder: Path, turn: int) -> None:
        from convert import convert

        convert(self.sources / str(turn), folder / self.target, overwrite=True, verify=True)

    def read(self, folder: Path) -> Any:
        from pdllm_jax.storage.checkpoint import load_model
        from pdllm_jax.storage.fingerprint import model_identity

        return model_identity(load_model(folder))


class BinConversion(Conversion):
    """The same of PyTorch's .bin files."""

    name = "bin"
    source: ClassVar[dict[str, str]] = {"stem": "pytorch_model", "suffix": ".bin"}


class Snapshot(Replacing):
    """Writes one document's KV over another's."""

    name = "snapshot"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        from pdllm_jax.storage.snapshot_format import SnapshotError

        self.refusal = SnapshotError  # type: ignore[misc]

    def work(self, folder: Path, turn: int) -> None:
        from campaigns import snapshot_kinds as kinds
        from pdllm_jax.storage.snapshot import save_document

        save_document(
            folder / self.target, kinds.IDENTITY, kinds.document(turn, 5 + turn),
            chunking=kinds.CHUNKS, overwrite=True,
        )  # fmt: skip

    def read(self, folder: Path) -> Any:
        import numpy as np

        from campaigns import snapshot_kinds as kinds
        from pdllm_jax.storage.snapshot import load_document
        from pdllm_jax.storage.snapshot_tree import arrays_of

        cache = load_document(folder, kinds.IDENTITY).cache
        return {k: np.asarray(x).tobytes() for k, x in arrays_of(cache, "cache").items()}


class Evaluation(Job):
    """Runs scripts/evaluate.py on a tiny model; goes on in the same folder when killed."""

    name = "evaluation"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        self.records: list[Any] = []
        self.rows: list[Any] = []
        self.kept = b""

    def prepare(self) -> None:
        from campaigns import samples
        from convert import convert

        samples.write_checkpoint(self.sources / "source")
        convert(self.sources / "source", self.sources / "model")
        (self.sources / "haystack.txt").write_text(samples.SENTENCES * 3)

    def work(self, folder: Path, turn: int) -> None:
        import evaluate

        arguments = [
            self.sources / "model", "needle", self.sources / "haystack.txt", "--out", folder,
            "--lengths", 160, "--depths", 4, "--needle", "The key is 7.", "--question", "Key?",
            "--expect", "7", "--chunk-size", 32, "--top-k", 1, "--encode-batch", 2,
            "--gen-length", 4, "--methods", "plain", "prefilling", "--no-chat",
        ]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = evaluate.main(list(map(str, arguments)))
        require(status == 0, f"exit status {status}")

    @staticmethod
    def _lines(folder: Path) -> list[Any]:
        path = folder / "records.jsonl"
        content = path.read_bytes() if path.exists() else b""
        rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    @staticmethod
    def _rows(folder: Path) -> list[Any]:
        rows = json.loads((folder / "summary.json").read_text())["rows"]
        return [{k: v for k, v in row.items() if k != "seconds_median"} for row in rows]

    def expect(self, folder: Path, turn: int) -> None:
        self.records, self.rows = self._lines(folder), self._rows(folder)
        require(len(self.records) == 8, f"{len(self.records)} records")

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        path = folder / "records.jsonl"
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        require(whole.startswith(self.kept), "records were lost or changed")
        self.kept = whole
        found = self._lines(folder)
        require(found == self.records[: len(found)], "other records")
        if (folder / "summary.json").exists():
            require(self._rows(folder) == self.rows, "a summary of half a run")
        cut = ", one cut off" if whole != content else ""
        return f"{len(found)} of {len(self.records)} records{cut}"

    def check_complete(self, folder: Path, turn: int) -> None:
        require(self._lines(folder) == self.records, "other records")
        require(self._rows(folder) == self.rows, "another summary")
        self.begin_anew(folder)

    def begin_anew(self, folder: Path) -> None:
        super().begin_anew(folder)
        self.kept = b""


def job_of(kind: str, sources: Path) -> Job:
    """The job, one of KINDS or "module:class"."""
    module, found, name = kind.partition(":")
    if found:
        return getattr(importlib.import_module(module), name)(sources)
    jobs: tuple[type[Job], ...] = (Conversion, BinConversion, Snapshot, Evaluation)
    return {job.name: job for job in jobs}[kind](sources)
