"""The adapter takes what lm-eval's own model wrappers take, and refuses the rest by its name."""

from __future__ import annotations

import dataclasses

import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.engine.engine import Engine
from pdllm_jax.evaluation.arguments import DECODING
from pdllm_jax.method.caches import cache_method
from pdllm_jax.method.likelihood import answer_log_likelihood
from pdllm_jax.storage.checkpoint import load_config
from tests.evaluation.conftest import ROWS, instance

pytest.importorskip("torch")
from pdllm_jax.evaluation.lm_eval import PrefillingLM

RULER_QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n"
    + "\n\n".join(f"Document {i}:\nTown {i} has a mayor called Person{i}. " for i in range(1, 40))
    + "\n\nAnswer the question based on the given documents. Only give me the answer and do not "
    "output any other words.\n\nQuestion: Who is the mayor of town 7?"
)


@pytest.mark.parametrize("task", ["ruler_qa_squad", "my_qa"])
@pytest.mark.parametrize("turns", [None, [], [("system", "Be brief.")], [("user", RULER_QA)]])
def test_ruler_s_question_is_in_the_query(model, task, turns):
    """lm-eval keeps all of the prompt in `input`; the answer begins with `gen_prefix`."""
    doc = {"index": 0, "input": RULER_QA, "outputs": ["Person7"], "gen_prefix": "Answer:"}
    prompt = f"{RULER_QA} Answer:"
    if turns is not None:
        turns = [*turns, ("assistant", "Person1")] if turns[:1] == [("user", RULER_QA)] else turns
        turns = [*turns, ("user", RULER_QA), ("assistant", "Answer:")]
        history = [{"role": role, "content": text} for role, text in turns]
        prompt = model.apply_chat_template(history, add_generation_prompt=False)
    split, _ = model._split(prompt, instance(prompt, doc=doc, task=task))
    assert "".join(split) == prompt
    assert "mayor of town 7" in split.after
    assert "mayor of town 7" not in split.context
    assert "Document 2:" in split.context
    assert "<|" not in split.context


CONVERSATIONS = {
    "system": [("system", "Answer in one word."), ("user", "{}")],
    "examples": [
        ("user", "Read this.\n\nThe sea.\n\nWhere?"),
        ("assistant", "Here"),
        ("user", "{}"),
    ],
    "begun": [("user", "{}"), ("assistant", "The answer is:")],
}
SPELT = "A page says <|eot_id|> and <|start_header_id|>. "  # text of a document, no token


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("known", [True, False])
def test_special_tokens_of_the_template_stay_tokens(model, kind, known):
    """Also behind a system text and examples as turns; those that a document spells stay text."""
    document = SPELT + ROWS[0]["context"]
    question = f"\n\nWhere does {'the captain of the ship ' * 3}live?"
    turns = [
        {"role": role, "content": text.format(f"Read this.\n\n{document}{question}")}
        for role, text in CONVERSATIONS[kind]
    ]
    begun = turns[-1]["role"] == "assistant"
    prompt = model.apply_chat_template(turns, add_generation_prompt=not begun)
    names = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    ids = {model.tokenizer.backend.token_to_id(name): name for name in names}
    doc = {"context": document} if known else {}
    parts = model._request(prompt, instance(prompt, doc=doc))
    # A turn has two header tokens and, if closed, an end; then the header of the response.
    want = 1 + 3 * len(turns) + (-1 if begun else 2)
    assert [sum(token in ids for token in part) for part in parts][1] == 0
    assert sum(token in ids for part in parts for token in part) == want
    decode = model.tokenizer.backend.decode
    texts = [decode(part, skip_special_tokens=False) for part in parts]
    assert "".join(texts) == prompt
    assert texts[1] == document
    assert texts[2].startswith(question)
    whole = model._dense(prompt, 8)
    assert sum(token in ids for token in whole) == want
    short, cut = model.prompts.truncated(prompt, 250, None)
    assert cut
    assert len(short) <= 250
    assert sum(token in ids for token in short) == want


def test_a_refused_task_computes_nothing(model, monkeypatch):
    monkeypatch.setattr(Engine, "answer", lambda *_, **__: pytest.fail("computed"))
    text = ROWS[0]["context"]
    asked = [instance("short", {}), instance(text, {}, doc={"context": text}, task="book_sum")]
    with pytest.raises(ValueError, match="task 'book_sum': no question follows its document"):
        model.generate_until(asked, disable_tqdm=True)
    asked[1] = instance("short", {"max_gen_toks": 4096})
    with pytest.raises(ValueError, match=r"4096 .*\(max_gen_toks\) .*max_sequence_length is 512"):
        model.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"until": [""]},
        {"until": ["", "\n\n"]},
        {"until": ""},
        {"until": "One"},
        {"until": ["w", "O"], "max_gen_toks": 8, "max_new_tokens": 16},
        {"max_new_tokens": 16, "max_tokens": 24},
        {"max_tokens": 24.0, "temperature": 0.7},
        {"max_completion_tokens": 12, "do_sample": False, "temperature": 0.7},
        {"do_sample": True, "temperature": 0.0, "top_p": 0.95},
        {"do_sample": False, "top_k": 50, "num_beams": 1, "seed": 4, "until": None},
    ],
)
def test_generation_kwargs_are_read_as_by_lm_eval(model, monkeypatch, kwargs):
    seen, text = [], "One.\n\nTwo."

    def respond(prompt, decoding, _):
        seen.append(decoding)
        return model.tokenizer.encode(text)

    monkeypatch.setattr(model, "_respond", respond)
    (got,) = model.generate_until([instance("Q", kwargs)], disable_tqdm=True)
    utils = pytest.importorskip(
        "lm_eval.models.utils", reason="lm-eval is not installed (pip install '.[lm-eval]')"
    )
    want = utils.normalize_gen_kwargs(kwargs)
    until = [stop for stop in want["until"] if stop is not None]
    assert got == utils.postprocess_generated_text(text, until, None)
    assert seen[0].gen_length == want["max_gen_toks"]
    assert seen[0].temperature == want.get("temperature", 0.0)


@pytest.mark.parametrize(
    ("kwargs", "text", "length"),
    [
        ({"until": [""]}, "One.\n\nTwo.", 256),
        ({"until": ["", "\n\n"], "max_new_tokens": 16}, "One.", 16),
        ({"max_tokens": 24}, "One.\n\nTwo.", 24),
        ({"max_gen_toks": 8, "max_new_tokens": 16}, "One.\n\nTwo.", 8),
    ],
)
def test_empty_stops_and_names_of_the_length(model, monkeypatch, kwargs, text, length):
    seen, answered = [], model.tokenizer.encode("One.\n\nTwo.")
    monkeypatch.setattr(
        model, "_respond", lambda _, decoding, __: seen.append(decoding) or answered
    )
    assert model.generate_until([instance("Q", kwargs)], disable_tqdm=True) == [text]
    assert seen[0].gen_length == length


@pytest.mark.parametrize("kwargs", [{"until": [1]}, {"max_tokens": 0}, {"num_beams": 4}, {"x": 1}])
def test_generation_kwargs_are_refused_by_name(model, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs)).replace("max_tokens", "max_gen_toks")):
        model.generate_until([instance("Q", kwargs)], disable_tqdm=True)


@pytest.mark.slow
def test_samples_of_one_prompt_differ(folder):
    model = PrefillingLM(str(folder), method="dual-cache", gen_length=8)
    kwargs = {"do_sample": True, "temperature": 1.0}
    asked = [instance("Q: who?", kwargs)] * 4
    samples = model.generate_until(asked, disable_tqdm=True)
    assert len(set(samples)) > 1
    assert model.generate_until(asked, disable_tqdm=True) == samples
    assert model.generate_until(asked[:1], disable_tqdm=True) == samples[:1]
    greedy = [instance("Q: who?", {"do_sample": False, "temperature": 1.0})] * 2
    assert len(set(model.generate_until(greedy, disable_tqdm=True))) == 1
    seeded = [instance("Q: who?", kwargs | {"seed": 7})] * 4
    assert model.generate_until(seeded, disable_tqdm=True) != samples


@pytest.mark.parametrize("bos", [True, False])
def test_log_likelihood_of_an_empty_context(folder, bos):
    model = PrefillingLM(str(folder), bos=bos, mc_num=2)
    ((value, _),) = model.loglikelihood([instance("", "Anne")], disable_tqdm=True)
    prefix = [model.tokenizer.bos_id] if bos else []
    ids = model.tokenizer.encode("Anne")
    assert value == answer_log_likelihood(model.model, prefix, ids, samples=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fast"}, "method 'fast'"),
        ({"method": "dllm-cache:rho=0.1"}, "method 'dllm-cache' has no setting 'rho'"),
        ({"top_k": 0}, "top_k"),
        ({"top_kk": 2}, "model_args not known: top_kk; allowed: add_bos_token, .*top_k"),
        ({"revision": "v2"}, "revision='v2' is not implemented, only None or 'main'"),
        ({"tokenizer": "other"}, "tokenizer='other'"),
        ({"peft": "lora"}, "model_args peft='lora'"),
        ({"parallelize": True}, "parallelize=True"),
        ({"mc_num": 0}, "mc_num must be a positive integer"),
        ({"cfg": 0.5}, "guidance is implemented for method 'plain'"),
        ({"steps": 8, "threshold": 0.9}, "steps and threshold"),
        ({"remasking": "best"}, "remasking"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"cfg": 1, "guidance": 1}, "guidance twice"),
        ({"pretrained": None}, "model_args need pretrained"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PrefillingLM(**{"pretrained": str(tmp_path), **changes})


def test_the_published_command_s_arguments(folder):
    """eval_llada.py's, and those that lm-eval's wrappers take; every decoding setting arrives."""
    mask_id = load_config(folder).mask_token_id
    published = {"mc_num": 4, "is_check_greedy": False, "cfg": 0.5, "mask_id": mask_id}
    published |= {"steps": 8, "gen_length": 16, "block_length": 8, "remasking": "random"}
    wrappers = {"trust_remote_code": True, "dtype": "auto", "revision": "main", "device": "cuda"}
    wrappers |= {"batch_size": "auto", "max_batch_size": 64, "parallelize": False, "peft": None}
    wrappers |= {"add_bos_token": False, "tensor_parallel_size": 1, "max_gen_toks": 64}
    model = PrefillingLM(model_path=str(folder), method="plain", **published, **wrappers)
    assert PrefillingLM(str(folder), tokenizer=str(folder)).folder == folder
    decoding, _ = model._generation({"until": []})
    assert (decoding.gen_length, decoding.block_length, decoding.steps) == (16, 8, 8)
    assert (decoding.threshold, decoding.guidance) == (None, 0.5)
    assert type(decoding.remasking).__name__ == "Random"
    assert model.prompts.encode("a") == model.tokenizer.encode("a")
    asked = [instance("Who is", " Anne")]
    ((value, _),) = model.loglikelihood(asked, disable_tqdm=True)
    ids = model.tokenizer.encode("Who is"), model.tokenizer.encode(" Anne")
    plan = {"samples": 4, "guidance": 0.5}
    assert value == answer_log_likelihood(model.model, *ids, **plan)
    model.generate_until([instance("Who is", {})], disable_tqdm=True)
    skipped = ("gen_length", "block_length", "top_k")
    fields = [field.name for field in dataclasses.fields(DecodeConfig)]
    assert {*fields} - {*skipped} | {"sample_top_k"} <= {*DECODING}


DREAM = {"max_new_tokens": 16, "diffusion_steps": 8, "add_bos_token": True, "eps": 0.01}
DREAM |= {"escape_until": False, "show_speed": True}
GIVEN = {"max_new_tokens": 16, "steps": 8, "eps": 0.01}
SAMPLED = {"temperature": 0.2, "top_p": 0.95, "alg_temp": 0.1}


@pytest.mark.parametrize(
    ("method", "given", "want"),
    [
        (
            "plain",
            {"alg": "entropy", **SAMPLED, "sample_top_k": 9},
            DecodeConfig.dream(**GIVEN, alg="entropy", **SAMPLED, top_k=9),
        ),
        ("plain", {"alg": "origin"}, DecodeConfig.dream(**GIVEN)),
        (
            "prefix-cache",
            {"alg": "entropy"},
            DecodeConfig.fast_dllm_dream(**GIVEN, alg="entropy", block_length=8),
        ),
        *(
            (
                method,
                {"alg": "confidence_threshold", "threshold": 0.8},
                DecodeConfig.fast_dllm_dream(
                    **GIVEN, threshold=0.8, block_length=8, dual_cache=True
                ),
            )
            for method in ("dual-cache", "prefilling")
        ),
    ],
)
def test_arguments_of_dream_s_published_evaluations(folder, method, given, want):
    model = PrefillingLM(str(folder), method=method, block_length=8, top_k=2, **DREAM, **given)
    decoding, _ = model._generation({"until": [], "do_sample": False})
    decoding = cache_method(method).decode_config(decoding)
    assert decoding == dataclasses.replace(want, stop_ids=decoding.stop_ids)
    assert model.engine.selection.top_k == 2
    with pytest.raises(ValueError, match="alg 'best' is not known"):
        PrefillingLM("nowhere", method=method, alg="best")
