"""scripts/generate.py: answers on stdout, one line and status 2 for bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from pdllm_jax import Tokenizer, load_config, load_model
from pdllm_jax.tokenizer import TokenizerError
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import generate

from pdllm_jax.cli.commands import Stream

PROMPT = {"prefix": [256, 5, 6], "context": list(range(60)), "query": [9, 8, 7]}
SMALL = [
    "--gen-length", "8", "--chunk-size", "16", "--top-k", "2", "--draft-length", "2",
    "--encode-batch", "2",
]  # fmt: skip


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    return make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256).folder


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = generate.main([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("method", ["prefilling", "plain"])
def test_what_does_not_fit_is_refused_in_one_line(checkpoint, tmp_path, capsys, method):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    status, out, err = run(
        capsys, checkpoint, "--prompt-ids", prompt, "--method", method, *SMALL,
        "--memory-limit", "0.0001",
    )  # fmt: skip
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert re.match(r"error: phase '\w+' needs \d+\.\d\d GB, the device gives 0\.00 GB; ", line)


@pytest.mark.parametrize("method", ["prefilling", "plain", "prefix-cache", "dual-cache"])
def test_json_of_every_method(checkpoint, tmp_path, capsys, method):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    status, out, err = run(
        capsys, checkpoint, "--prompt-ids", prompt, "--method", method, "--json", *SMALL
    )
    assert status == 0, err
    result = json.loads(out)
    assert len(result["tokens"]) == 8
    assert isinstance(result["text"], str)
    assert result["evaluations"] == 8
    assert set(result["timings"]) == {"draft", "score", "encode", "decode", "compile", "total"}
    assert result["timings"]["total"] == pytest.approx(
        sum(v for k, v in result["timings"].items() if k != "total")
    )
    assert result["paths"]["dtype"] == "float32"
    if method == "prefilling":
        assert len(result["selection"]["chunks"]) == 2
        assert len(result["selection"]["scores"]) == 4
        assert result["paths"]["chunk_attention"] == "xla"
    else:
        assert result["selection"] is None


def test_text_in_text_out_and_a_bare_prompt(checkpoint, tmp_path, capsys):
    text = write(tmp_path / "text.txt", "a short document")
    status, out, err = run(
        capsys, checkpoint, "--context-file", text, "--question", "what?", "--early-stop", *SMALL
    )
    assert status == 0, err
    assert "chunks kept: " in out
    bare = write(tmp_path / "bare.json", {"prompt": [1, 2, 3]})
    status, out, _ = run(
        capsys, checkpoint, "--prompt-ids", bare, "--method", "plain", "--json", *SMALL
    )
    assert status == 0
    early = run(
        capsys, checkpoint, "--prompt-ids", bare, "--method", "plain", "--early-stop", *SMALL
    )
    assert early[0] == 0, early[2]
    whole = write(tmp_path / "parts.json", {"prefix": [1], "context": [2], "query": [3]})
    _, other, _ = run(
        capsys, checkpoint, "--prompt-ids", whole, "--method", "plain", "--json", *SMALL
    )
    assert json.loads(out)["tokens"] == json.loads(other)["tokens"]


@pytest.mark.slow
def test_scorers_and_encodings(checkpoint, tmp_path, capsys):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    seen = {}
    names = ("leave-one-out", "query", "confidence", "first", "last", "random", "all", "oracle")
    for score in names:
        chunks = ("--chunks", "2", "0") if score == "oracle" else ()
        status, out, err = run(
            capsys, checkpoint, "--prompt-ids", prompt, "--score", score,
            "--encoding", "independent", "--json", *chunks, *SMALL,
        )  # fmt: skip
        assert status == 0, err
        seen[score] = json.loads(out)["selection"]
    assert seen["first"]["chunks"] == [0, 1]
    assert seen["last"]["chunks"] == [2, 3]
    assert seen["all"] == {"chunks": [0, 1, 2, 3], "scores": None}
    assert len(seen["leave-one-out"]["scores"]) == 4
    assert len(seen["confidence"]["scores"]) == 4
    assert seen["oracle"] == {"chunks": [0, 2], "scores": None}


def test_choices_of_the_method_together(checkpoint, tmp_path, capsys):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    status, out, err = run(
        capsys, checkpoint, "--prompt-ids", prompt, "--json", *SMALL,
        "--encoding", "bridge", "--bridge-share", "0.3", "--bridge-tokens", "attention",
        "--positions", "absolute", "--keep-tokens", "9", "--max-k", "3", "--margin", "100",
        "--reselect", "block", "--block-length", "4",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert result["paths"]["encoding"] == "bridge"
    assert len(result["selection"]["chunks"]) == 3
    assert len(result["selection"]["chunks_at_end"]) == 3
    assert result["selection"]["rescored"] == 1


@pytest.mark.parametrize("method", ["prefilling", "plain"])
def test_streamed_blocks_make_the_same_output(checkpoint, tmp_path, capsys, method):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    arguments = (checkpoint, "--prompt-ids", prompt, "--method", method, "--block-length", "2")
    arguments += ("--seed", "1", "--temperature", "1", *SMALL)
    whole, streamed = (run(capsys, *arguments, *more) for more in ((), ("--stream",)))
    assert (whole[0], streamed[0]) == (0, 0), streamed[2]
    without_times = (out.split("seconds:")[0] for out in (whole[1], streamed[1]))
    assert len(set(without_times)) == 1


class Spelling:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 255).decode(errors="replace")


def test_a_stream_writes_whole_characters_and_what_has_changed(capsys):
    stream = Stream()
    stream.tokenizer = Spelling()
    seen = []
    for piece in ([65, 0xC3], [0xA4, 66], [67]):
        stream(0, len(seen), piece)
        seen.append(capsys.readouterr().out)
    assert seen == ["A", "\u00e4B", "C"]
    stream.finish("A\u00e4BC and more")
    assert capsys.readouterr().out == " and more\n"
    stream.finish("A\u00e4XC")
    assert capsys.readouterr().out == "\nA\u00e4XC\n"
    bare = Stream()
    bare(0, 0, [3, 4])
    bare(0, 1, [5])
    bare.finish("3 4 5 6")
    assert capsys.readouterr().out == "3 4 5 6\n"


def test_a_pytorch_folder_is_converted_once(checkpoint, tmp_path, capsys):
    prompt = write(tmp_path / "prompt.json", PROMPT)
    arguments = (checkpoint, "--prompt-ids", prompt, "--method", "plain", *SMALL)
    assert "converting" in run(capsys, *arguments)[2]
    assert "converting" not in run(capsys, *arguments)[2]
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    assert load_model(converted).config == load_config(converted)


BAD = {
    "no such checkpoint": (["--prompt-ids", "P"], {}, "is not a directory"),
    "id outside": ([], {"context": [3, 272]}, r"context\[1\] = 272 is outside the vocabulary"),
    "negative id": ([], {"query": [-1]}, "outside the vocabulary"),
    "empty context": ([], {"context": []}, "context is empty"),
    "empty query": ([], {"query": []}, "question is empty"),
    "strings": ([], {"query": ["a"]}, "list of integers"),
    "true": ([], {"query": [True]}, "list of integers"),
    "block": (["--gen-length", "8", "--block-length", "3"], {}, "does not divide"),
    "oracle without ids": (["--score", "oracle"], {}, "needs the ids of the chunks"),
    "oracle outside": (
        ["--score", "oracle", "--chunks", "9", *SMALL],
        {},
        r"\[9\] are not all inside \[0, 4\)",
    ),
    "oracle over K": (
        ["--score", "oracle", "--chunks", "0", "1", "2", *SMALL],
        {},
        "names 3 chunks, top_k is 2",
    ),
    "chunks of another scorer": (["--chunks", "1"], {}, "for the scorer 'oracle', not for 'draft'"),
    "chunks of a baseline": (["--method", "plain", "--chunks", "1"], {}, "for method 'prefilling'"),
    "no response": (["--gen-length", "0"], {}, "gen_length must be a positive"),
    "chunk size": (["--chunk-size", "0"], {}, "chunk_size must be a positive"),
    "chunk of an anchor": (["--chunk-size", "1"], {}, "leaves no new token"),
    "top-k": (["--top-k", "-2"], {}, "top_k must be a positive"),
    "steps": (["--gen-length", "8", "--block-length", "4", "--steps", "3"], {}, "not a multiple"),
    "threshold": (["--threshold", "1.5"], {}, "threshold must lie"),
    "temperature": (["--temperature", "-1"], {}, "temperature must be"),
    "nan": (["--temperature", "nan"], {}, "temperature must be"),
    "guidance": (["--guidance", "1"], {}, "guidance is implemented for method 'plain'"),
    "both rules": (["--threshold", "0.5", "--factor", "1"], {}, "exclude each other"),
    "draft": (["--draft-length", "0"], {}, "draft_length must be a positive"),
    "kernel": (["--implementation", "mosaic_gpu"], {}, "implementation .mosaic_gpu.: the"),
    "encoding": (["--encoding", "causal"], {}, "argument --encoding: invalid choice: 'causal'"),
    "positions": (["--positions", "relative"], {}, "argument --positions: invalid choice"),
    "reselect": (["--reselect", "often"], {}, "argument --reselect: invalid choice"),
    "bridge tokens": (["--bridge-tokens", "end"], {}, "argument --bridge-tokens: invalid choice"),
    "bridge share": (
        ["--encoding", "bridge", "--bridge-share", "0"],
        {},
        r"share must lie in \(0, 1\]",
    ),
    "kept tokens": (["--keep-tokens", "0"], {}, "keep_tokens must be a positive"),
    "max-k": (["--max-k", "2"], {}, "max_k 2 is less than top_k 4"),
    "margin": (["--max-k", "5", "--margin", "-1"], {}, "margin must be a number of at least 0"),
    "margin alone": (["--margin", "1"], {}, "margin needs max_k"),
    "reselect a control": (
        ["--reselect", "step", "--score", "first"],
        {},
        "reselect needs a scorer that reads the document, not 'first'",
    ),
    "stream and json": (["--stream", "--json"], {}, "not allowed with argument"),
    "seed": (["--seed", "9223372036854775808"], {}, "seed must be a signed 64-bit integer"),
    "memory of inf": (["--memory-limit", "inf"], {}, "must be a number of GB, got inf"),
    "memory of nan": (["--memory-limit", "nan"], {}, "must be a number of GB, got nan"),
    "memory of none": (["--memory-limit", "0"], {}, "must be a number of GB, got 0"),
    "huge response": (
        ["--gen-length", "99999999999"],
        {},
        "gen_length must be a positive integer below",
    ),
    "huge chunk": (
        ["--chunk-size", "99999999999"],
        {},
        "chunk_size must be a positive integer below",
    ),
    "huge id": (["--score", "oracle", "--chunks", "2147483648", *SMALL], {}, "not all inside"),
    "question of ids": (["--question", "q"], {}, "part of the ids"),
    "instruction of ids": (["--instruction", "x"], {}, "part of the ids"),
    "unknown key": ([], {"more": []}, "must hold the keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(name, checkpoint, tmp_path, capsys):
    arguments, change, message = BAD[name]
    prompt = write(tmp_path / "prompt.json", {**PROMPT, **change})
    folder = tmp_path / "nowhere" if name == "no such checkpoint" else checkpoint
    arguments = [a for a in arguments if a not in ("--prompt-ids", "P")]
    status, out, err = run(capsys, folder, "--prompt-ids", prompt, *arguments)
    assert status == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("converting", "loading"))]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ("", "not valid JSON")],
)
def test_prompt_files_that_are_none(checkpoint, tmp_path, capsys, content, message):
    prompt = write(tmp_path / "prompt.json", content)
    status, _, err = run(capsys, checkpoint, "--prompt-ids", prompt)
    assert status == 2
    assert message in err


def test_context_files_that_are_none(checkpoint, tmp_path, capsys):
    empty = write(tmp_path / "empty.txt", " \n")
    assert run(capsys, checkpoint, "--context-file", empty, "--question", "q")[0] == 2
    assert run(capsys, checkpoint, "--context-file", tmp_path / "no", "--question", "q")[0] == 2
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, checkpoint, "--context-file", binary, "--question", "q")
    assert (status, "not UTF-8" in err) == (2, True)
    fine = write(tmp_path / "fine.txt", "text")
    assert run(capsys, checkpoint, "--context-file", fine)[0] == 2
    assert run(capsys, checkpoint, "--context-file", fine, "--question", " ")[0] == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [("<|startoftext|>", "no BOS token"), ("<|mdm_mask|>", "no mask token")],
)
def test_a_tokenizer_without_bos_or_mask(make_checkpoint, missing, message):
    from tests.oracles import checkpoints

    folder = make_checkpoint().folder
    special = tuple(t for t in checkpoints.SPECIAL_TOKENS if t != missing)
    checkpoints.write_tokenizer(folder, special)
    config = load_config(folder)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(folder, config)


def edit_tokenizer(folder, change) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_lengths_that_a_tokenizer_was_saved_with_do_not_apply(checkpoint):
    """Of a long document, all tokens; of a short one, no more."""

    def saved(content) -> None:
        content["truncation"] = {
            "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        content["padding"] = {
            "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "!",
        }  # fmt: skip

    edit_tokenizer(checkpoint, saved)
    tokenizer = Tokenizer.load(checkpoint, load_config(checkpoint))
    assert len(tokenizer.encode("a" * 100)) == 100
    assert len(tokenizer.encode("abc")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The library numbers added tokens anew and says nothing.
        (lambda t: t["added_tokens"][-1].update(id=270), "has the id 270 in tokenizer.json but"),
        # Its own code panics, which is no Exception.
        (
            lambda t: t["model"].update(
                merges=[["!", '"']], continuing_subword_prefix="more than there is"
            ),
            "cannot be read: (range|byte index)",
        ),
        (lambda t: t.update(model=None), "cannot be read"),
    ],
)
def test_tokenizers_that_are_none(checkpoint, change, message):
    edit_tokenizer(checkpoint, change)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(checkpoint, load_config(checkpoint))
    assert "\n" not in str(caught.value)


def test_special_tokens_spelt_out_in_a_document_stay_text(checkpoint):
    tokenizer = Tokenizer.load(checkpoint, load_config(checkpoint))
    encoded = tokenizer.encode("<|mdm_mask|><|eot_id|>")
    assert max(encoded) < 256
    assert tokenizer.decode(encoded) == "<|mdm_mask|><|eot_id|>"


def test_chat_template_around_the_document(checkpoint):
    tokenizer = Tokenizer.load(checkpoint, load_config(checkpoint))
    prefix, query = tokenizer.around_document("why?", "read")
    text = tokenizer.backend.decode(prefix + tokenizer.encode("DOC") + query, False)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nread\n\nDOC\n\nwhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_response_ends_at_the_end_of_turn(checkpoint):
    tokenizer = Tokenizer.load(checkpoint, load_config(checkpoint))
    ids = tokenizer.encode("yes")
    assert tokenizer.decode([*ids, tokenizer.stop_ids[1], *ids]) == "yes"
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "yes"
    assert tokenizer.decode(ids) == "yes"
