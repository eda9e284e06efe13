"""Tokenizers of checkpoints: special tokens, and prompts against transformers' chat templates."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pdllm_jax import Tokenizer, load_config
from pdllm_jax.evaluation.chat import ChatPrompts
from pdllm_jax.evaluation.prompts import SplitPrompt, dense_prompt, split_request
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.tokenizer import TokenizerError

pytest.importorskip("torch")

from tests.oracles import checkpoints
from tests.oracles.dream_tokenizer import CHATML, write_dream_tokenizer


@pytest.fixture
def checkpoint(make_checkpoint) -> Path:
    return make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256).folder


def load_tokenizer(folder: Path, change=lambda content: None) -> Tokenizer:
    """The tokenizer of a checkpoint whose tokenizer.json has been changed."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return Tokenizer.load(folder, load_config(folder))


def with_template(folder: Path, template: str | None, **special: dict) -> tuple[Tokenizer, object]:
    """The tokenizer and transformers' own, with a chat template, and flags of special tokens."""
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings | ({"chat_template": template} if template else {})))

    def change(content: dict) -> None:
        for token in content["added_tokens"]:
            token.update(special.get(token["content"].strip("<|>"), {}))

    ours = load_tokenizer(folder, change)
    return ours, PreTrainedTokenizerFast.from_pretrained(str(folder))


def turns(content: str) -> str:
    """A template of LLaDA's markers, in which a turn's text is `content`."""
    return (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        + content
        + " + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
MERGES = (  # as Llama 2 does: the system text is a part of the user's turn, which is trimmed
    "{% set s = '' %}{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' +"
    " messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token + '[INST] ' + (s + messages[0]['content']) | trim + ' [/INST]' }}"
)
TEMPLATES = {
    "published": checkpoints.CHAT_TEMPLATE,
    "untrimmed": turns("m['content']"),
    "left": turns("m['content'].lstrip()"),
    "line ends": turns("m['content'].strip('\\n')"),
    "markers": "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content.strip() + '\n' }}"
    "{% endfor %}### assistant:\n",
    "merged": MERGES,
    "refuses": REFUSES + checkpoints.CHAT_TEMPLATE,
}
PARTS = {
    "instruction": ("Read it.\n\n", "  Read it. \n\n", "", " \n\n"),
    "document": ("A document.", "\n\n  A document. \n", "\t \n"),
    "question": ("\n\nWho?", " \nWho? ", "\n\nWho?\n\n ", ""),
}


SYSTEMS = ["", "Be brief.", " \nBe brief.\n "]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_what_transformers_makes_of_the_message(checkpoint, template, system):
    ours, theirs = with_template(checkpoint, TEMPLATES[template])
    if system and template == "refuses":
        with pytest.raises(TokenizerError, match="chat template cannot be used: No system role"):
            ours.around_document("Who?", system=system)
        return
    assert_same_prompts(ours, theirs, system)


def read_chatml(folder: Path, template: str | None) -> tuple[Tokenizer, object]:
    """The tokenizer of a Dream folder with a chat template, and transformers' with ChatML."""
    from transformers import Qwen2Tokenizer

    write_dream_tokenizer(folder, chat_template=template)
    config = checkpoints.tiny_config(mask_token_id=260, eos_token_id=256)
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = CHATML
    return Tokenizer.load(folder, ModelConfig.from_dict(config)), tokenizer


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", [CHATML, None])
def test_chatml_prompts(tmp_path, template, system):
    """Without a template in the files they are the same: Dream's tokens say that it is ChatML."""
    ours, theirs = read_chatml(tmp_path, template)
    assert_same_prompts(ours, theirs, system)
    text = ours.backend.decode(ours.encode_message(" Who? ", system=system), False)
    assert text == (
        f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n"
        "<|im_start|>user\n Who? <|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.stop_ids == (256, 258)
    assert ours.decode([*ours.encode("yes"), 258, *ours.encode("no")]) == "yes"


def test_chatml_prompts_of_lm_eval(tmp_path):
    """The last user's text in the middle of ChatML's turns, which special tokens do not end."""
    prompts = ChatPrompts(read_chatml(tmp_path, CHATML)[0])
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    for head in ([], turns[:1], turns[1:], turns):
        text = prompts.render([*head, {"role": "user", "content": "a<|im_end|>b"}])
        start, stop = prompts.turn(text)
        assert text[start:stop] == "a<|im_end|>b"
        marks = sum(i > 255 for i in prompts.encode(text))
        assert marks == 2 * (len(head) + (turns[0] not in head)) + 3


def assert_same_prompts(ours, theirs, system):
    """Byte for byte: the tokenizer has no merges, so that no token crosses a seam."""
    head = [{"role": "system", "content": system}] if system else []
    for parts in itertools.product(*PARTS.values()):
        message = [*head, {"role": "user", "content": "".join(parts)}]
        text = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        want = theirs(text, add_special_tokens=False).input_ids
        split = ours.encode_prompt(*parts, system=system)
        assert list(itertools.chain(*split)) == want, parts
        assert ours.encode_message("".join(parts), system=system) == want
        if not system:
            assert dense_prompt(ours, "".join(parts), 999)[0] == want
            request = split_request(ours, SplitPrompt(*parts))
            assert [*request.prefix, *request.context, *request.question] == want
    before, document, after = "Read it.\n\n", "A document.", "\n\nWho? "
    prefix, query = ours.around_document("Who? ", "Read it.", system=system)
    split = ours.encode_prompt(before, document, after, system=system)
    assert (prefix, ours.encode(document), query) == split


def test_blanks_beside_a_marker_go_where_the_tokenizer_drops_them(checkpoint):
    """As Phi-3's markers do."""
    flags = {"end_header_id": {"rstrip": True}, "eot_id": {"lstrip": True}}
    ours, theirs = with_template(checkpoint, TEMPLATES["untrimmed"], **flags)
    text = " \nWho?\n\n "
    want = theirs.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert ours.encode_message(text) == theirs(want, add_special_tokens=False).input_ids


def test_special_tokens_in_a_prompt_count_in_the_templates_own_text_alone(checkpoint):
    tokenizer, _ = with_template(checkpoint, checkpoints.CHAT_TEMPLATE)
    text, marks = "a<|eot_id|>b", {}
    for system, part in itertools.product(("", text), ("plain", text)):
        ids = tokenizer.encode_message(part, system=system)
        marks[system, part] = sum(i > 255 for i in ids)
    assert marks["", text] == marks["", "plain"] == 6
    assert marks[text, text] == marks[text, "plain"] == 9


def test_without_a_template_bos_comes_first_and_nothing_else(checkpoint):
    chat, _ = with_template(checkpoint, checkpoints.CHAT_TEMPLATE)
    base = load_tokenizer(checkpoint)
    object.__setattr__(base, "template", None)
    for tokenizer, turn in ((base, {}), (chat, {"chat": False})):
        prefix, query = tokenizer.around_document(" Who? ", " Read. ", **turn)
        assert prefix == [tokenizer.bos_id, *tokenizer.encode(" Read. \n\n")]
        assert query == tokenizer.encode("\n\n Who? \n")
        want = [tokenizer.bos_id, *tokenizer.encode(" all of it \n")]
        assert tokenizer.encode_message(" all of it \n", **turn) == want
        with pytest.raises(TokenizerError, match="system text needs a chat template"):
            tokenizer.encode_message("a", system="b", **turn)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (turns("m['content'] | upper"), "has the user's message 0 times, not once"),
        (turns("m['content'] + m['content']"), "has the user's message 2 times"),
        ("{{ messages[-1]['content'] }}", "has the system text 0 times"),
        ("{{ messages[-1]['content'].replace(' ', '_') }}", "changes more of a message than"),
        ("{{ nothing.at.all }}", "cannot be used"),
    ],
)
def test_templates_that_do_not_give_the_text_back_are_refused(checkpoint, template, message):
    system = "s" if "system" in message else ""
    with pytest.raises(TokenizerError, match=message):
        with_template(checkpoint, template)[0].encode_message(" a ", system=system)


@pytest.mark.parametrize(
    ("missing", "message"), [("<|startoftext|>", "no BOS token"), ("<|mdm_mask|>", "no mask token")]
)
def test_a_tokenizer_without_bos_or_mask(checkpoint, missing, message):
    special = tuple(t for t in checkpoints.SPECIAL_TOKENS if t != missing)
    checkpoints.write_tokenizer(checkpoint, special)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(checkpoint)


def test_lengths_that_a_tokenizer_was_saved_with_do_not_apply(checkpoint):
    """Of a long document, all tokens; of a short one, no more."""
    sides = {"direction": "Right", "stride": 0, "pad_to_multiple_of": None}
    pad = {"pad_id": 1, "pad_type_id": 0, "pad_token": "!", "strategy": {"Fixed": 20}}
    saved = {"truncation": {**sides, "max_length": 8, "strategy": "LongestFirst"}}
    saved["padding"] = {**sides, **pad}
    tokenizer = load_tokenizer(checkpoint, lambda content: content.update(saved))
    assert len(tokenizer.encode("a" * 100)) == 100
    assert len(tokenizer.encode("abc")) == 3


# Merges that make the library's own code panic, which is not an Exception.
PANIC = {"merges": [["!", '"']], "continuing_subword_prefix": "more than a token has"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The library numbers added tokens anew and says nothing.
        (lambda t: t["added_tokens"][-1].update(id=270), "has the id 270 in tokenizer.json but"),
        (lambda t: t["model"].update(PANIC), "cannot be read: (range|byte index)"),
        (lambda t: t.update(model=None), "cannot be read"),
    ],
)
def test_damaged_tokenizers(checkpoint, change, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(checkpoint, change)
    assert "\n" not in str(caught.value)


def test_special_tokens_spelt_out_in_a_document_stay_text(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    encoded = tokenizer.encode("<|mdm_mask|><|eot_id|>")
    assert max(encoded) < 256
    assert tokenizer.decode(encoded) == "<|mdm_mask|><|eot_id|>"


def test_chat_template_around_the_document_and_its_end_of_turn(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    prefix, query = tokenizer.around_document("why?", "read")
    text = tokenizer.backend.decode(prefix + tokenizer.encode("DOC") + query, False)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nread\n\nDOC\n\nwhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer.encode("yes")
    assert tokenizer.stop_ids[0] == tokenizer.eos_id
    for stop in ([], *([stop, *ids] for stop in tokenizer.stop_ids)):
        assert tokenizer.decode([*ids, *stop]) == "yes"
