"""What campaigns are there to find: loaders that fail at case 7, and a careless writer."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

from campaigns.fuzz import rng_of
from campaigns.jobs import Replacing
from campaigns.kind import Kind, require


class _Bad(Kind):
    refusals = (ValueError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.name = f"tests.bad_kinds:{type(self).__name__}"
        self.draw = 0.9
        self.bad = rng_of(self.name, 0, 7).random()

    def write(self, rng: Random) -> None:
        self.draw = rng.random()

    def load(self) -> Any:
        if self.draw == self.bad:
            return self.misbehave()
        if self.draw < 0.5:
            raise ValueError("refused")
        return self.draw

    def misbehave(self) -> Any:
        raise NotImplementedError

    def check(self, loaded: Any) -> None:
        require(loaded == self.draw, "lies")


class Crashes(_Bad):
    def misbehave(self) -> Any:
        os.abort()


class Hangs(_Bad):
    def misbehave(self) -> Any:
        time.sleep(100)


class Allocates(_Bad):
    def misbehave(self) -> Any:
        return bytes(1 << 35)


class WritesOutside(_Bad):
    def misbehave(self) -> Any:
        (self.folder.parent / "outside" / "new").write_text("x")


class RemovesOutside(_Bad):
    def misbehave(self) -> Any:
        os.rmdir(self.folder.parent / "outside")


class Connects(_Bad):
    def misbehave(self) -> Any:
        return socket.create_connection(("127.0.0.1", 9))


class Executes(_Bad):
    def misbehave(self) -> Any:
        return subprocess.run(["true"])


class RaisesWhatIsNotDocumented(_Bad):
    def misbehave(self) -> Any:
        raise KeyError("x")


class LoadsAsWhatItIsNot(_Bad):
    def misbehave(self) -> Any:
        return "something else"


class Careless(Replacing):
    """Writes in place, line by line."""

    name = "tests.bad_kinds:Careless"
    refusal = ValueError

    def work(self, folder: Path, turn: int) -> None:
        (folder / self.target).mkdir(exist_ok=True)
        with (folder / self.target / "lines").open("w") as file:
            for _ in range(20):
                print(turn, file=file, flush=True)
                time.sleep(0.02)

    def read(self, folder: Path) -> Any:
        return (folder / "lines").read_text()
