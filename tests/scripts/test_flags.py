"""Flags of the settings: each has a text, and sets its field."""

from __future__ import annotations

import dataclasses

from pdllm_jax import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.cli import flags
from pdllm_jax.cli.commands import parser_of

VALUES = """
gen_length=64 block_length=16 steps=8 temperature=0.5 threshold=0.5 remasking=margin
recompute=suffix chunk_size=100 overlap=3 top_k=5 max_k=6 margin=0.5 reselect=step
masked_copies=2 draft_length=1 encode_batch=3 encoding=bridge bridge_share=0.5
bridge_tokens=attention positions=reuse keep_tokens=9 keep_by=both
"""


def test_every_setting_has_a_flag_with_a_text_that_sets_it():
    parser = parser_of("answer", None)
    texts = {action.dest: action.help for action in parser._actions}
    for settings in (ChunkConfig, SelectionConfig, DecodeConfig):
        names = {field.name for field in dataclasses.fields(settings)} - set(flags.DERIVED)
        assert all(texts[flags.dest_of(settings, name)] for name in names)
    values = dict(pair.split("=") for pair in VALUES.split())
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    argv += ["--keep-first", "--no-anchors", "checkpoint", "--prompt-ids", "F"]
    settings = flags.engine_settings(parser.parse_args(argv))
    flat = dataclasses.asdict(settings["chunking"])
    flat |= settings["decoding"].to_flat() | settings["selection"].to_flat()
    assert {name: str(flat[name]) for name in values} == values
    assert (flat["keep_first"], flat["anchors"]) == (True, False)


def test_flags_of_dream_s_sampling():
    argv = (
        "--schedule time --steps 9 --eps 0.01 --remasking origin --temperature 0.2 --gen-length 8"
    )
    argv += " --sample-top-p 0.95 --sample-top-k 7"
    argv += " --scaled-confidence --first-slot-alone"
    argv = [*argv.split(), "checkpoint", "--prompt-ids", "F"]
    settings = flags.engine_settings(parser_of("answer", None).parse_args(argv))
    sampling = {"temperature": 0.2, "top_p": 0.95, "top_k": 7, "first_slot_alone": True}
    want = DecodeConfig.dream(max_new_tokens=8, steps=9, eps=0.01, **sampling, recompute="block")
    assert settings["decoding"] == want
    assert settings["selection"].top_k == SelectionConfig().top_k
