"""Chat templates as tokenizer_config.json may have them: read, or refused in one clear line."""

from __future__ import annotations

import json

import pytest

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.tokenizer import Tokenizer, TokenizerError
from tests.oracles import checkpoints

PLAIN = "U:{% for m in messages %}{{ m['content'] }}{% endfor %}!"
KIND = (
    "chat_template in tokenizer_config.json must be text, or named texts with one called 'default'"
)


def read(folder, template):
    checkpoints.write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return Tokenizer.load(folder, ModelConfig.from_dict(checkpoints.tiny_config())).template


@pytest.mark.parametrize(
    "template", [PLAIN, {"default": PLAIN, "rag": "x"}, [{"name": "default", "template": PLAIN}]]
)
def test_templates_that_transformers_writes(template, tmp_path):
    assert read(tmp_path, template) == ("U:", "!")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        *((kind, KIND) for kind in (5, True, 1.5, [], {}, [PLAIN], [5], {"rag": PLAIN})),
        *((kind, KIND) for kind in ({"default": 5}, {"default": [PLAIN]}, [{"template": PLAIN}])),
        *(([{"name": name, "template": None}], KIND) for name in ("default", "rag")),
        *((text, "has the user's message 0 times, not once") for text in ("", "no messages")),
        (PLAIN + PLAIN, "has the user's message 2 times, not once"),
        ("{{ messages.x.y }}", "the chat template cannot be used: .* no attribute 'x'"),
        ("{{ messages[0].content.x() }}", "the chat template cannot be used: .* no attribute 'x'"),
        ("{% for", "the chat template cannot be used: unexpected"),
        ("{{ raise_exception('no users') }}", "the chat template cannot be used: no users"),
    ],
)
def test_others_are_refused(template, message, tmp_path):
    with pytest.raises(TokenizerError, match=message) as caught:
        read(tmp_path, template)
    assert "\n" not in str(caught.value)


def test_settings_that_are_no_object(tmp_path):
    checkpoints.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json must hold an object"):
        Tokenizer.load(tmp_path, ModelConfig.from_dict(checkpoints.tiny_config()))
