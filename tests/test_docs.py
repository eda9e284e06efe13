"""Code in docs/ runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_python_blocks_run_and_give_the_shapes_that_their_comments_say(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
        for line in block.splitlines():
            told = re.findall(r"\[[\d, ]+\]", line.partition("#")[2])
            targets = [name.strip() for name in line.partition("=")[0].split(",")]
            for name, shape in zip(targets, told, strict=False):
                assert list(names[name].shape) == eval(shape), line
    assert blocks, "a page of docs/ without any code: take it out of this test's reach"
