"""The adapter for lm-eval: a local task from its files to a score, as evaluate.py's."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pdllm_jax import Tokenizer, load_config, load_model
from pdllm_jax.evaluation.prompts import dense_prompt
from pdllm_jax.method.likelihood import answer_log_likelihood
from tests.conftest import ROOT
from tests.support import evals_data

if not os.environ.get("HF_HOME"):
    os.environ["HF_HOME"] = str(ROOT / ".cache" / "huggingface")
lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed (pip install '.[lm-eval]')"
)
pytest.importorskip("torch")
from lm_eval.tasks import TaskManager  # noqa: E402

from pdllm_jax.evaluation.lm_eval import PrefillingLM  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate  # noqa: E402

SETTINGS = {
    "chunk_size": 64, "top_k": 2, "encode_batch": 4, "threshold": 0.3, "scorer": "last",
    "max_length": 150,
}  # fmt: skip
FLAGS = [
    "--chunk-size", "64", "--top-k", "2", "--encode-batch", "4", "--threshold", "0.3",
    "--score", "last", "--max-length", "150",
]  # fmt: skip
TEMPLATE = "Read this.\n\n{context}\n\nQuestion: {input}\nAnswer:"
ROWS = [
    {"input": f"Where is {name}?", "context": evals_data.TEXT * n, "answers": [name, "Hall e"]}
    for n, name in ((3, "Anne"), (2, "Mary"), (4, "Lyme"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a converted tiny checkpoint: 512 positions, a vocabulary of bytes."""
    from convert import convert
    from tests.oracles import checkpoints

    config = checkpoints.tiny_config(
        n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, max_sequence_length=512
    )
    source = tmp_path_factory.mktemp("lm_eval") / "pytorch"
    tensors = checkpoints.random_tensors(config)
    checkpoints.write_checkpoint(source, tensors, config, tokenizer=True)
    convert(source, source.parent / "orbax")
    return source.parent / "orbax"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks on local files: one generates and is scored by LongBench's F1, one is a choice."""
    place = tmp_path_factory.mktemp("tasks")
    evals_data.write_lines(place / "qa.jsonl", ROWS)
    choices = [{**row, "choices": ["Anne", "Hall"], "gold": 1} for row in ROWS[:2]]
    evals_data.write_lines(place / "choice.jsonl", choices)
    (place / "metric.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from experiments.benchmarks.metrics import english_f1\n\n\n"
        "def results(doc, found):\n"
        "    return {'f1': max(english_f1(found[0], answer) for answer in doc['answers'])}\n"
    )
    prompt = json.dumps(TEMPLATE.replace("{", "{{").replace("}", "}}"))
    cache = json.dumps(str(place / "cache"))
    for name, lines in {
        "qa": [
            "output_type: generate_until", 'doc_to_target: "{{answers[0]}}"',
            "process_results: !function metric.results",
            "metric_list: [{metric: f1, aggregation: mean, higher_is_better: true}]",
            'generation_kwargs: {max_gen_toks: 8, do_sample: false, until: ["\\n\\n"]}',
        ],
        "choice": [
            "output_type: multiple_choice", "doc_to_choice: choices", "doc_to_target: gold",
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
        ],
    }.items():  # fmt: skip
        files = json.dumps({"test": str(place / f"{name}.jsonl")})
        (place / f"local_{name}.yaml").write_text(
            "\n".join([
                f"task: local_{name}", "dataset_path: json", "test_split: test",
                f"dataset_kwargs: {{data_files: {files}, cache_dir: {cache}}}",
                f"doc_to_text: {prompt}", *lines,
            ]) + "\n"
        )  # fmt: skip
    return place


def native(folder: Path, data: Path, out: Path, method: str, *flags: str) -> dict[str, dict]:
    """The records of scripts/evaluate.py on the same examples, as LongBench's hotpotqa."""
    evals_data.write_lines(data / "hotpotqa.jsonl", ROWS)
    for name, content in (("dataset2prompt", TEMPLATE), ("dataset2maxlen", 8)):
        (data / f"{name}.json").write_text(json.dumps({"hotpotqa": content}), encoding="utf-8")
    command = [folder, "longbench", data, "--out", out, "--methods", method, *FLAGS, *flags]
    assert evaluate.main([str(part) for part in command]) == 0
    found = [json.loads(line) for line in (out / "records.jsonl").read_bytes().splitlines()]
    return {record["id"]: record for record in found if "run" not in record}


def harness(model: PrefillingLM, tasks: Path, name: str, **kwargs):
    return lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True, bootstrap_iters=0, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "chat"), [("prefilling", True), ("dual-cache", False)])
def test_scores_and_answers_are_the_native_harness_s(folder, tasks, tmp_path, method, chat):
    flags = [] if chat else ["--no-chat"]
    want = native(folder, tmp_path / "data", tmp_path / "out", method, *flags)
    model = PrefillingLM(str(folder), method=method, **SETTINGS)
    found = harness(model, tasks, "local_qa", apply_chat_template=chat)
    samples = found["samples"]["local_qa"]
    got = {str(s["doc_id"] + 1): s for s in samples}
    # The task's stop text is lm-eval's alone.
    assert {i: s["resps"][0][0] for i, s in got.items()} == {
        i: record["response"].split("\n\n")[0] for i, record in want.items()
    }
    assert {i: s["f1"] for i, s in got.items()} == {i: r["score"] for i, r in want.items()}
    mean = np.mean([record["score"] for record in want.values()])
    assert found["results"]["local_qa"]["f1,none"] == pytest.approx(mean)
    if method == "prefilling":
        assert model.cuts == {"context": 3}
    else:
        assert model.truncated == sum(record["truncated"] for record in want.values()) > 0


def test_choices_by_monte_carlo_log_likelihood(folder, tasks):
    """The whole prompt's likelihood is the library's function of it."""
    model = PrefillingLM(str(folder), method="plain", mc_num=6, mc_batch=3, seed=5)
    found = harness(model, tasks, "local_choice")
    tokenizer = Tokenizer.load(folder, load_config(folder))
    network = load_model(folder)
    for sample in found["samples"]["local_choice"]:
        doc = sample["doc"]
        prompt = TEMPLATE.format(context=doc["context"], input=doc["input"])
        ids, _ = dense_prompt(tokenizer, prompt, 500, chat=False)
        for choice, response in zip(doc["choices"], sample["resps"], strict=True):
            answer = tokenizer.encode(f" {choice}")
            want = answer_log_likelihood(network, ids, answer, samples=6, group=3, seed=5)
            assert float(response[0][0]) == pytest.approx(want, rel=1e-6)


def instance(prompt: str, *args, doc=None, task="t"):
    return SimpleNamespace(args=(prompt, *args), doc=doc or {}, task_name=task)


@pytest.fixture(scope="module")
def model(folder) -> PrefillingLM:
    return PrefillingLM(
        str(folder), chunk_size=64, top_k=2, encode_batch=4, scorer="last", mc_num=4, mc_batch=4
    )


def test_log_likelihood_by_the_method_and_its_greedy_check(model, monkeypatch):
    prompt = TEMPLATE.format(context=ROWS[0]["context"], input="?")
    asked = [instance(prompt, f" {x}", doc=ROWS[0]) for x in ("Anne", "Hall")]
    (first, greedy), (second, _) = model.loglikelihood(asked, disable_tqdm=True)
    assert first < 0
    assert second < 0
    assert first != second
    assert greedy is False
    monkeypatch.setattr(model, "is_check_greedy", True)
    answer = " Anne"
    ids = model.tokenizer.encode(answer)
    monkeypatch.setattr(model, "_respond", lambda prompt, decode, _: ids)
    assert model.loglikelihood([instance(prompt, answer, doc=ROWS[0])], disable_tqdm=True)[0][1]
    with pytest.raises(ValueError, match="no token of its own"):
        model.loglikelihood([instance("a", "")], disable_tqdm=True)
    with pytest.raises(NotImplementedError, match="perplexity"):
        model.loglikelihood_rolling([])


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_where_prompts_are_cut(model, task):
    parts = evals_data.RULER_PROMPTS[task]
    prompt = "".join(parts)
    doc = {"input": prompt, "outputs": ["x"]}
    assert model._split(prompt, instance(prompt, doc=doc, task=f"ruler_{task}")) == (parts, "ruler")
    named = {"other": parts[1]} if len(parts[1]) * 2 > len(prompt) else {"context": parts[1]}
    assert model._split(prompt, instance(prompt, doc=named)) == (parts, "context")
    long = f"Do this.\n\n{'The sea. ' * 99}\n\nWhich comes twice?\nAnswer:"
    cut = model._split(long, instance(long))
    assert cut[1] == "rule"
    assert cut[0].before == "Do this.\n\n"
    assert cut[0].after == "\n\nWhich comes twice?\nAnswer:"
    templated = model.apply_chat_template([{"role": "user", "content": long}])
    around = model._split(templated, instance(templated))[0]
    assert around.context == cut[0].context
    assert around.before.endswith("<|end_header_id|>\n\nDo this.\n\n")
    assert around.after.startswith(cut[0].after + "<|eot_id|>")
    assert model._split("one line", instance("one line"))[1] == "whole"


def test_short_prompts_and_what_tasks_may_ask_for(model, monkeypatch):
    seen = []

    def respond(network, prefix, context, query, *, method, decode, **_):
        seen.append((method, [*prefix, *context, *query], decode))
        return SimpleNamespace(tokens=model.tokenizer.encode("one\n\ntwo STOP three"))

    monkeypatch.setattr("pdllm_jax.evaluation.lm_eval.adapter.generate_ids", respond)

    def ask(prompt: str, **settings) -> str:
        return model.generate_until([instance(prompt, settings)], disable_tqdm=True)[0]

    assert ask("short", until=["STOP", "\n\n"], max_gen_toks=50) == "one"
    method, ids, decode = seen[-1]
    assert method == "dual-cache", "nothing to choose from"
    assert ids == [model.tokenizer.bos_id, *model.tokenizer.encode("short")]
    assert (decode.gen_length, decode.block_length, decode.temperature) == (50, 25, 0.0)
    assert ask("short", until="STOP", temperature=1, do_sample=False) == "one\n\ntwo "
    assert ask("short", do_sample=True, temperature=0.5) == "one\n\ntwo STOP three"
    assert seen[-1][2].temperature == 0.5
    for settings, message in (
        ({"do_sample": True, "top_p": 0.9}, "sampling with top_p is not implemented"),
        ({"num_return_sequences": 2}, "num_return_sequences are not known"),
    ):
        with pytest.raises(ValueError, match=message):
            ask("short", **settings)
    long = TEMPLATE.format(context=ROWS[0]["context"] + "<|eot_id|>", input="?")
    doc = {**ROWS[0], "context": ROWS[0]["context"] + "<|eot_id|>"}
    templated = model.apply_chat_template([{"role": "user", "content": long}])
    model.generate_until([instance(templated, {}, doc=doc)], disable_tqdm=True)
    method, ids, _ = seen[-1]
    assert method == "prefilling"
    ends = [i for i, token in enumerate(ids) if token == model.tokenizer.chat[2]]
    assert len(ends) == 1, "a document's text is data"


def test_chat_template_is_llada_s(model):
    transformers = pytest.importorskip("transformers")
    from tests.oracles.checkpoints import CHAT_TEMPLATE

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model.folder / "tokenizer.json"), bos_token="<|startoftext|>"
    )
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who? \n"},
        {"role": "assistant", "content": "Anne"}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    want = theirs.apply_chat_template(
        turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert model.apply_chat_template(turns) == want
    assert model._encode(want) == theirs(want, add_special_tokens=False)["input_ids"]
    begun = model.apply_chat_template(turns[1:3], add_generation_prompt=False)
    assert begun.endswith("<|end_header_id|>\n\nAnne")
    assert model.tokenizer_name == str(model.folder)


def test_settings_are_checked_before_anything_is_loaded(tmp_path):
    for changes, message in (({"method": "fast"}, "method 'fast'"), ({"top_k": 0}, "top_k")):
        with pytest.raises(ValueError, match=message):
            PrefillingLM(str(tmp_path), **changes)


def test_the_command_finds_the_model(folder, tasks, tmp_path):
    """lm-eval's own command line, through the module that registers the model."""
    settings = {"pretrained": folder, "method": "plain", "gen_length": 2}  # little to compile
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    done = subprocess.run(
        [sys.executable, "-m", "pdllm_jax.evaluation.lm_eval", "--model", "pdllm",
         "--model_args", arguments,
         "--tasks", "local_qa", "--include_path", str(tasks), "--limit", "1",
         "--output_path", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "local_qa" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["results"]["local_qa"]["f1,none"] >= 0
    assert results["config"]["model"] == "pdllm"
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
