"""Code in docs/ runs as it stands there, and so does the example of a loop."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex

import numpy as np
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


def test_the_readme_does_what_it_says(make_checkpoint, tmp_path, monkeypatch, capsys):
    """Its commands for a checkpoint of one's own, with a tiny one, and its code on the result."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=4096).folder
    made.rename(tmp_path / "LLaDA-8B-Instruct")
    (tmp_path / "book.txt").write_text("It is a truth universally acknowledged. " * 30)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    \.venv/bin/python scripts/(\w+)\.py (.*llada-8b .*)$", text, re.M)
    assert [script for script, _ in commands][:2] == ["convert_checkpoint", "generate"]
    for script, arguments in commands[:2]:
        assert importlib.import_module(script).main(shlex.split(arguments)) == 0, script
    assert "evaluations: " in capsys.readouterr().out
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    draw = np.random.default_rng(0).integers
    names = {"prefix_ids": draw(0, 40, 5), "context_ids": draw(0, 40, 1100)}
    names["query_ids"] = draw(0, 40, 7)
    exec(compile(block, "README.md", "exec"), names)
    assert names["state"].block.tolist() == [1]
    assert names["prompt"].chunk_lengths.sum() == 1100 + 2  # anchors
