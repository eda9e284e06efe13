"""What a user meets first: the import, docstrings of public names, and the command lines."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import convert
import pallas_kernels
import pdllm_jax
from pdllm_jax import deprecated
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))


def python(code: str, **settings) -> subprocess.CompletedProcess:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=240, **settings)


def test_importing_touches_no_device_and_little_else():
    """JAX and Flax take nearly all of the import's time; of others only what is quick comes in."""
    code = (
        "import sys, jax, flax.nnx; before = set(sys.modules);"
        "import pdllm_jax; from jax._src import xla_bridge; assert not xla_bridge._backends;"
        "ours = {'pdllm_jax', 'pallas_kernels', 'jaxtyping'};"
        "new = {name.partition('.')[0] for name in sys.modules.keys() - before};"
        "assert not new - ours - sys.stdlib_module_names, new"
    )
    python(code).check_returncode()


def test_how_command_lines_end(capsys):
    from pdllm_jax.cli.errors import status

    def fail(error):
        def call():
            raise error

        return call

    assert status(lambda: None) == 0
    assert status(lambda: 1) == 1
    assert status(fail(ValueError("no\nsuch thing"))) == 2
    assert status(fail(OSError(28, "disk full", "there"))) == 2
    assert status(fail(KeyboardInterrupt())) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: no such thing", "error: [Errno 28] disk full: 'there'", "interrupted"]
    assert status(fail(ValueError())) == 2
    assert capsys.readouterr().err == "error: ValueError()\n"
    assert status(fail(OverflowError("too large"))) == 2
    assert status(fail(MemoryError("9 GB"))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: too large"
    assert lines[1].startswith("error: the host ran out of memory (9 GB)")
    with pytest.raises(RuntimeError):
        status(fail(RuntimeError("a bug keeps its traceback")))


SAYS = """
import sys
from pdllm_jax.cli.errors import leave, status
leave(status(lambda: print("\u00e9 " * 10)))
"""


@pytest.mark.parametrize("place", ["/dev/full", "a reader that has gone"])
def test_output_that_nobody_takes_is_one_line(place):
    if place != "/dev/full":
        reader, place = os.pipe()
        os.close(reader)
    with open(place, "w") as out:
        done = python(SAYS, stdout=out)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: [Errno ")
    assert done.stderr.count("\n") == 1


ENDLESS = """
import os, signal, threading
import jax
from pdllm_jax.cli.errors import leave, status
signal.signal(signal.SIGINT, signal.default_int_handler)
def step(carry):
    return carry[0] + 1, jax.numpy.sin(carry[1] @ carry[1])
loop = jax.jit(lambda x: jax.lax.while_loop(lambda carry: carry[0] < 2**31 - 1, step, (0, x))[1])
def work():
    running = loop(jax.numpy.ones((256, 256)))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    running.block_until_ready()
leave(status(work))
"""


def test_an_interrupt_ends_a_computation_that_does_not():
    done = python(ENDLESS)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_output_that_an_encoding_lacks_is_spelled_out():
    done = python(SAYS, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\xe9 " * 10 + "\n")


@pytest.mark.parametrize("module", [pdllm_jax, pallas_kernels, convert], ids=lambda m: m.__name__)
def test_every_public_name_says_what_it_is(module):
    assert module.__doc__
    for name in module.__all__:
        public = getattr(module, name)
        if not (inspect.isclass(public) or inspect.isroutine(public)):
            continue  # a constant, or another name of a type
        # A dataclass without a docstring is given its signature.
        written = public.__dict__.get("__doc__") if inspect.isclass(public) else public.__doc__
        assert written, name
        assert not written.startswith(f"{name}("), name


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_command_lines(script, capsys):
    """--help has an example and the exit status; a wrong flag is one line and status 2."""
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.search(rf"^ +(scripts/)?{script}\.py", shown, re.MULTILINE), shown
    assert re.search("exit status", shown, re.IGNORECASE), shown
    with pytest.raises(SystemExit) as stopped:
        main(["--no-such-flag"])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert "error: " in captured.err.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages(tmp_path):
    """Every module, the tuning tables and the type markers; no tests, no scripts."""
    pytest.importorskip("setuptools")
    packages = ("pdllm_jax", "pallas_kernels", "convert")
    source = tmp_path / "source"  # building leaves its own files there
    for package in packages:
        shutil.copytree(ROOT / package, source / package)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }
    assert names == wanted
    assert {f"{package}/py.typed" for package in packages} <= names


def test_there_are_at_most_40_public_names_and_old_ones_are_found_with_a_warning():
    assert len(pdllm_jax.__all__) <= 40
    for name in (*deprecated._MOVED, *deprecated._CALLS):
        assert name not in pdllm_jax.__all__
        with pytest.warns(DeprecationWarning, match=f"pdllm_jax.{name} is deprecated. Use "):
            assert getattr(pdllm_jax, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pdllm_jax.nothing
