"""Code in docs/ runs as it stands there, and so does the example of a loop."""

from __future__ import annotations

import re
import runpy
import shlex

import pytest

from convert.__main__ import main as convert_main
from pdllm_jax import cli
from tests.conftest import ROOT

# Made of records by scripts, without code.
MADE = ("performance", "results", "rivals")
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
    """Runs README's commands on a tiny checkpoint, then its code on the result."""
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    source = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=4096).folder
    source.rename(tmp_path / "LLaDA-8B-Instruct")
    book = "It is a truth universally acknowledged. " * 30
    (tmp_path / "book.txt").write_text(book)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^    (pdllm\S*) (.*llada-8b.*)$", text, re.M))
    assert convert_main(shlex.split(commands["pdllm-convert"])) == 0
    assert cli.main(shlex.split(commands["pdllm"])) == 0
    assert "evaluations: " in capsys.readouterr().out
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {"context": book}
    exec(compile(block, "README.md", "exec"), names)
    first, second = names["answer"], names["answers"][0]
    assert first.tokens == second.tokens  # one process or two phases: the same answer
