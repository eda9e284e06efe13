"""The adapter for lm-eval: a local task from its files to a score, as evaluate.py's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pdllm_jax import load_model
from pdllm_jax.engine.engine import Engine
from pdllm_jax.evaluation.prompts import dense_prompt
from pdllm_jax.method.caches import cache_method
from pdllm_jax.method.likelihood import answer_log_likelihood
from tests.conftest import ROOT
from tests.evaluation.conftest import ROWS, TEMPLATE, instance
from tests.support import evals_data

if not os.environ.get("HF_HOME"):
    os.environ["HF_HOME"] = str(ROOT / ".cache" / "huggingface")
pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[lm-eval]')")
pytest.importorskip("torch")
import lm_eval
from lm_eval.tasks import TaskManager

from pdllm_jax.evaluation.lm_eval import PrefillingLM

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate

SETTINGS = {"chunk_size": 64, "top_k": 2, "encode_batch": 4, "threshold": 0.3, "max_length": 150}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
METRIC = f"""import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from experiments.benchmarks.metrics import english_f1

def results(doc, responses):
    return {{"f1": max(english_f1(responses[0], answer) for answer in doc["answers"])}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks on local files: one generates and is scored by LongBench's F1, one is a choice."""
    place = tmp_path_factory.mktemp("tasks")
    evals_data.write_lines(place / "qa.jsonl", ROWS)
    choices = [{**row, "choices": ["Anne", "Hall"], "gold": 1} for row in ROWS[:2]]
    evals_data.write_lines(place / "choice.jsonl", choices)
    (place / "metric.py").write_text(METRIC)
    metric = {"aggregation": "mean", "higher_is_better": True}
    for name, fields in {
        "qa": {
            "output_type": "generate_until",
            "doc_to_target": "{{answers[0]}}",
            "metric_list": [{"metric": "f1", **metric}],
            "generation_kwargs": {"max_gen_toks": 8, "do_sample": False, "until": ["\n\n"]},
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **metric}],
        },
    }.items():
        files = {"data_files": {"test": str(place / f"{name}.jsonl")}}
        fields |= {"task": f"local_{name}", "dataset_path": "json", "test_split": "test"}
        fields["dataset_kwargs"] = files | {"cache_dir": str(place / "cache")}
        fields["doc_to_text"] = TEMPLATE.replace("{", "{{").replace("}", "}}")
        lines = [f"{field}: {json.dumps(value)}" for field, value in fields.items()]
        if name == "qa":
            lines.append("process_results: !function metric.results")
        (place / f"local_{name}.yaml").write_text("\n".join(lines) + "\n")
    return place


def native(folder: Path, data: Path, out: Path, method: str, *flags: str) -> dict[str, dict]:
    """The records of scripts/evaluate.py on the same examples, as LongBench's hotpotqa."""
    evals_data.write_lines(data / "hotpotqa.jsonl", ROWS)
    for name, content in (("dataset2prompt", TEMPLATE), ("dataset2maxlen", 8)):
        (data / f"{name}.json").write_text(json.dumps({"hotpotqa": content}), encoding="utf-8")
    command = [folder, "longbench", data, "--out", out, "--methods", method, "--score", "last"]
    assert evaluate.main([str(part) for part in [*command, *FLAGS, *flags]]) == 0
    records = [json.loads(line) for line in (out / "records.jsonl").read_bytes().splitlines()]
    return {record["id"]: record for record in records if "id" in record}


def harness(model: PrefillingLM, tasks: Path, name: str, **kwargs):
    settings = {"task_manager": TaskManager(include_path=str(tasks)), "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(
        model=model, tasks=[name], log_samples=True, **settings, **kwargs
    )


@pytest.mark.parametrize(("method", "chat"), [("prefilling", True), ("dual-cache", False)])
def test_scores_and_answers_are_the_native_harness_s(folder, tasks, tmp_path, method, chat):
    flags = [] if chat else ["--no-chat"]
    want = native(folder, tmp_path / "data", tmp_path / "out", method, *flags)
    model = PrefillingLM(str(folder), method=method, scorer="last", **SETTINGS)
    results = harness(model, tasks, "local_qa", apply_chat_template=chat)
    samples = results["samples"]["local_qa"]
    got = {str(s["doc_id"] + 1): s for s in samples}
    # The task's stop text is lm-eval's alone.
    assert {i: s["resps"][0][0] for i, s in got.items()} == {
        i: record["response"].split("\n\n")[0] for i, record in want.items()
    }
    assert {i: s["f1"] for i, s in got.items()} == {i: r["score"] for i, r in want.items()}
    mean = np.mean([record["score"] for record in want.values()])
    assert results["results"]["local_qa"]["f1,none"] == pytest.approx(mean)
    if method == "prefilling":
        assert model.cuts == {"context": 3}
    else:
        assert model.truncated == sum(record["truncated"] for record in want.values()) > 0


def test_choices_by_monte_carlo_log_likelihood(folder, tasks):
    """The whole prompt's likelihood is the library's function of it."""
    model = PrefillingLM(str(folder), method="plain", mc_num=6, mc_batch=3, seed=5)
    samples = harness(model, tasks, "local_choice")["samples"]["local_choice"]
    tokenizer, network = model.tokenizer, load_model(folder)
    for sample in samples:
        doc = sample["doc"]
        prompt = TEMPLATE.format(**doc)
        ids, _ = dense_prompt(tokenizer, prompt, 500, chat=False)
        for choice, response in zip(doc["choices"], sample["resps"], strict=True):
            answer = tokenizer.encode(f" {choice}")
            want = answer_log_likelihood(network, ids, answer, samples=6, group=3, seed=5)
            assert float(response[0][0]) == pytest.approx(want, rel=1e-6)


def test_log_likelihood_by_the_method_and_its_greedy_check(model, monkeypatch):
    prompt = TEMPLATE.format(context=ROWS[0]["context"], input="?")
    asked = [instance(prompt, f" {x}", doc=ROWS[0]) for x in ("Anne", "Hall")]
    (first, greedy), (second, _) = model.loglikelihood(asked, disable_tqdm=True)
    assert max(first, second) < 0
    assert first != second
    assert greedy is False
    monkeypatch.setattr(model, "is_check_greedy", True)
    answer = " Anne"
    ids = model.tokenizer.encode(answer)
    monkeypatch.setattr(model, "_respond", lambda *_: ids)
    assert model.loglikelihood([instance(prompt, answer, doc=ROWS[0])], disable_tqdm=True)[0][1]
    with pytest.raises(ValueError, match="adds no token to its context"):
        model.loglikelihood([instance("a", "")], disable_tqdm=True)
    with pytest.raises(ValueError, match="perplexity"):
        model.loglikelihood_rolling([])


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_where_prompts_are_cut(model, task):
    parts = evals_data.RULER_PROMPTS[task]
    prompt = "".join(parts)
    doc = {"input": prompt, "outputs": ["x"]}
    assert model._split(prompt, instance(prompt, doc=doc, task=f"ruler_{task}")) == (parts, "ruler")
    named = {"other": parts[1]} if len(parts[1]) * 2 > len(prompt) else {"context": parts[1]}
    assert model._split(prompt, instance(prompt, doc=named)) == (parts, "context")


def test_where_prompts_of_unknown_templates_are_cut(model):
    long = f"Do this.\n\n{'The sea. ' * 99}\n\nWhich comes twice?\nAnswer:"
    split, cut = model._split(long, instance(long))
    assert (cut, split.before) == ("rule", "Do this.\n\n")
    assert split.after == "\n\nWhich comes twice?\nAnswer:"
    templated = model.apply_chat_template([{"role": "user", "content": long}])
    around, _ = model._split(templated, instance(templated))
    assert around.context == split.context
    assert around.before.endswith("<|end_header_id|>\n\nDo this.\n\n")
    assert around.after.startswith(split.after + "<|eot_id|>")
    assert model._split("one line", instance("one line"))[1] == "whole"


def test_short_prompts_and_what_tasks_may_ask_for(model, monkeypatch):
    seen = []

    def respond(engine, context, question, *, prefix, **_):
        name = cache_method(engine.method).name
        seen.append((name, [*prefix, *context, *question], engine.decoding))
        return SimpleNamespace(tokens=model.tokenizer.encode("one\n\ntwo STOP three"))

    monkeypatch.setattr(Engine, "answer", respond)

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
    ask("short", do_sample=True, top_p=0.9, top_k=-1)
    assert (seen[-1][2].top_p, seen[-1][2].top_k) == (0.9, None)
    ask("short", temperature=0.5, top_k=7)
    assert (seen[-1][2].top_p, seen[-1][2].top_k) == (None, 7)
    ask("short", top_p=0.9, top_k=7)
    assert (seen[-1][2].top_p, seen[-1][2].top_k) == (None, None), "greedy"
    with pytest.raises(ValueError, match=r"generation_kwargs min_p=0.1 is not implemented"):
        ask("short", do_sample=True, min_p=0.1)
    with pytest.raises(ValueError, match="num_return_sequences=2 is not implemented"):
        ask("short", num_return_sequences=2)
    long = TEMPLATE.format(context=ROWS[0]["context"] + "<|eot_id|>", input="?")
    doc = {**ROWS[0], "context": ROWS[0]["context"] + "<|eot_id|>"}
    templated = model.apply_chat_template([{"role": "user", "content": long}])
    model.generate_until([instance(templated, {}, doc=doc)], disable_tqdm=True)
    method, ids, _ = seen[-1]
    assert method == "prefilling"
    ends = [i for i, token in enumerate(ids) if token == model.tokenizer.stop_ids[1]]
    assert len(ends) == 1, "a document's text is data"


def test_chat_template_is_llada_s(model):
    transformers = pytest.importorskip("transformers")
    from tests.oracles.checkpoints import CHAT_TEMPLATE

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model.folder / "tokenizer.json"), bos_token="<|startoftext|>"
    )
    roles = ("system", "user", "assistant", "user")
    texts = ("Be brief.", " Who? \n", "Anne", "Why?")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    want = theirs.apply_chat_template(
        turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert model.apply_chat_template(turns) == want
    assert model.prompts.encode(want) == theirs(want, add_special_tokens=False)["input_ids"]
    begun = model.apply_chat_template(turns[1:3], add_generation_prompt=False)
    assert begun.endswith("<|end_header_id|>\n\nAnne")
    assert model.tokenizer_name == str(model.folder)


def test_the_command_finds_the_model(folder, tasks, tmp_path):
    """lm-eval's own command line, through the module that registers the model."""
    command = [sys.executable, "-m", "pdllm_jax.evaluation.lm_eval", "--model", "pdllm"]
    command += ["--model_args", f"pretrained={folder},method=plain,gen_length=2"]
    command += ["--tasks", "local_qa", "--include_path", str(tasks), "--limit", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command += ["--output_path", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "local_qa" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["results"]["local_qa"]["f1,none"] >= 0
    assert results["config"]["model"] == "pdllm"
