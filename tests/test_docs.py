"""Code in docs/ runs as it stands there, and so does the example of a loop."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.conftest import ROOT

# Made of records by scripts, without code.
MADE = ("performance", "results")
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in MADE)


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


def test_the_example_loop_ends_inside_a_block(capsys):
    """As its own rule says, after chunks were scored again, and says what it did."""
    response = runpy.run_path(str(ROOT / "examples" / "denoise_loop.py"))["main"]([])
    lines = capsys.readouterr().out.splitlines()
    evaluations = [line for line in lines if line.startswith("evaluation ")]
    assert 4 < len(evaluations) < 16
    assert sum(line.startswith("  chunks [") for line in lines) == (len(evaluations) - 1) // 4
    assert lines[-2:] == ["  the text has ended", f"response: {' '.join(map(str, response))}"]
    assert not any(token % 8 == 0 for token in response)
