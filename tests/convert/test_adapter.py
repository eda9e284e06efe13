"""LoRA adapters: merged as peft's formula says, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources

torch = pytest.importorskip("torch")
NAME = "adapter_model.safetensors"
BLOCK = f"{sources.PREFIX}blocks.1."
# Module and its shape, [out, in].
MODULES = {"q_proj": (24, 24), "k_proj": (12, 24), "ff_proj": (40, 24), "ff_out": (24, 40)}


def settings(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json with the keys that peft writes."""
    return {
        "peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base", "bias": "none",
        "r": 4, "lora_alpha": 6, "target_modules": list(MODULES), "use_dora": False,
        "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
        "init_lora_weights": True, "lora_dropout": 0.05, "modules_to_save": None,
        "layer_replication": None, "megatron_core": "megatron.core", "qalora_group_size": 16,
        "inference_mode": True, "task_type": "CAUSAL_LM", "loftq_config": {}, **changes,
    }  # fmt: skip


def eighths(*shape: int) -> Any:
    """Random eighths: float32 sums of their products are exact in any order."""
    return torch.randint(-16, 17, shape).float() / 8


def factors(ranks: dict[str, int], name: str = "{}.{}.weight") -> dict[str, Any]:
    """A and B of the modules of a block, under peft's names."""
    result = {}
    for module, rank in ranks.items():
        rows, columns = MODULES[module]
        path = f"base_model.model.{BLOCK}{module}"
        result[name.format(path, "lora_A")] = eighths(rank, columns)
        result[name.format(path, "lora_B")] = eighths(rows, rank)
    return result


def write(folder: Path, tensors: dict[str, Any], *, binary: bool = False, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings(**changes)))
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file({key: value.numpy() for key, value in tensors.items()}, folder / NAME)
    return folder


# Settings, the ranks, and the scale of each module by peft's definition.
SCALES: list[tuple[dict[str, Any], dict[str, int], dict[str, float]]] = [
    ({}, {"q_proj": 4}, {"q_proj": 6 / 4}),
    ({"use_rslora": True}, {"k_proj": 4, "ff_out": 4}, {"k_proj": 3.0, "ff_out": 3.0}),
    (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"blocks\.1\.ff_.*": 16}},
        {"q_proj": 2, "k_proj": 4, "ff_proj": 4},
        {"q_proj": 3.0, "k_proj": 1.5, "ff_proj": 4.0},
    ),
    ({"use_rslora": True, "rank_pattern": {"_proj": 9}}, {"q_proj": 4}, {"q_proj": 3.0}),
    # Of layers that are stored [in, out], which LLaDA does not have: peft switches it off.
    ({"fan_in_fan_out": True, "lora_alpha": 2.0}, {"q_proj": 4, "ff_out": 4}, {"q_proj": 0.5}),
]


@pytest.mark.parametrize(("changes", "ranks", "scales"), SCALES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "adapter name in the keys"])
def test_merging_is_pytorchs_in_float32(
    tmp_path: Path,
    changes: dict[str, Any],
    ranks: dict[str, int],
    scales: dict[str, float],
    dtype: str,
    form: str,
) -> None:
    torch.manual_seed(0)
    values = sources.make(tmp_path, dtype)
    name = "{}.{}.default.weight" if form.endswith("keys") else "{}.{}.weight"
    parts = factors(ranks, name)
    adapter = write(tmp_path / "adapter", parts, binary=form == "bin", **changes)

    report = convert(tmp_path / "source", tmp_path / "out", adapter=adapter, verify=True)

    for module in ranks:
        path = f"base_model.model.{BLOCK}{module}"
        a, b = (parts[name.format(path, x)] for x in ("lora_A", "lora_B"))
        weight = torch.from_numpy(values[f"{BLOCK}{module}.weight"].astype(np.float32))
        merged = weight + b @ a * scales.get(module, 0.5)
        values[f"{BLOCK}{module}.weight"] = merged.numpy().astype(sources.DTYPES[dtype])
    sources.assert_converted(tmp_path / "out", values)
    (note,) = report.notes
    assert "LLaDA-8B-Base" in note
    assert f"merged {len(ranks)} tensors" in note


def test_embeddings_and_modules_to_save(tmp_path: Path) -> None:
    """An embedding adds (B A)^T; a saved module replaces the weight."""
    values = sources.make(tmp_path, "bfloat16")
    a, b, head, base = eighths(4, 52), eighths(24, 4), eighths(52, 24), eighths(52, 24)
    prefix = f"base_model.model.{sources.PREFIX}"
    parts = {f"{prefix}wte.lora_embedding_A": a, f"{prefix}wte.lora_embedding_B": b}
    parts |= {f"{prefix}ff_out.weight": head, f"{prefix}wte.base_layer.weight": base}
    adapter = write(tmp_path / "adapter", parts, modules_to_save=["transformer.ff_out"])
    convert(tmp_path / "source", tmp_path / "out", adapter=adapter, dtype="float32")
    values = {name: value.astype(np.float32) for name, value in values.items()}
    values[f"{sources.PREFIX}wte.weight"] = (base + (b @ a).T * 1.5).numpy()
    values[f"{sources.PREFIX}ff_out.weight"] = head.numpy()
    sources.assert_converted(tmp_path / "out", values)


Q = factors({"q_proj": 4})
LORA_A = next(iter(Q))
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (Q, {"use_dora": True}, "use_dora=True"),
    (Q, {"bias": "all"}, "bias='all'"),
    (Q, {"lora_bias": True}, "lora_bias=True"),
    (Q, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    (Q, {"target_parameters": ["w"]}, "target_parameters=['w']"),
    (Q, {"key_of_2030": 3}, "key_of_2030=3"),
    *((Q, {"peft_type": kind}, f"peft_type={kind!r}") for kind in ("IA3", "LOHA", "ADALORA", None)),
    (Q, {"r": 8}, "do not fit rank 8"),
    (Q, {"r": 0}, "rank 0"),
    (Q, {"lora_alpha": "x"}, "alpha 'x'"),
    (Q, {"rank_pattern": {"(": 2}}, "rank_pattern cannot be read"),
    ({LORA_A: Q[LORA_A]}, {}, "has lora_A without the other factor"),
    ({LORA_A.replace("blocks.1", "blocks.7"): Q[LORA_A]}, {}, "blocks.7.q_proj.weight' is not in"),
    ({**Q, LORA_A.replace("A.weight", "magnitude_vector"): eighths(3)}, {}, "magnitude_vector'"),
    ({**Q, LORA_A.replace("A.weight", "B.bias"): eighths(3)}, {}, "lora_B.bias'"),
    ({**Q, LORA_A.replace("A.", "A.x."): Q[LORA_A]}, {}, "is there twice"),
    ({**Q, LORA_A[11:].replace("q_proj", "k_proj"): Q[LORA_A]}, {}, "several prefixes"),
    ({k: x.double() for k, x in Q.items()}, {}, "unsupported dtype"),
    ({f"base_model.model.{BLOCK}q_proj.weight": eighths(3, 3)}, {}, "shape [3, 3], not [24, 24]"),
    ({**Q, LORA_A: Q[LORA_A] * np.inf}, {}, "is NaN or infinite"),
    ({}, {}, "changes no tensor"),
]


@pytest.mark.parametrize(("parts", "changes", "expected"), REFUSED)
def test_what_does_not_merge_is_refused(
    tmp_path: Path, parts: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    sources.make(tmp_path)
    adapter = write(tmp_path / "adapter", parts, **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out", adapter=adapter)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "out").exists()


def test_adapter_files_are_never_left_out(tmp_path: Path) -> None:
    """Alone, they name the base model; beside weights, they are merged on demand or refused."""
    values, source = sources.make(tmp_path), tmp_path / "source"
    adapter, out = write(tmp_path / "adapter", Q), tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*GSAI-ML/LLaDA-8B-Base.*--adapter"):
        convert(adapter, out)
    for name in ("adapter_config.json", NAME):
        shutil.copy(adapter / name, source / name)
        with pytest.raises(CheckpointError, match=f"an adapter beside weights.*{name}.*--adapter"):
            convert(source, out)
    with pytest.raises(CheckpointError, match="an adapter beside weights"):
        convert(source, out, adapter=adapter)
    convert(source, out, adapter=source)
    assert not np.array_equal(
        sources.read_params(out)["blocks.1.q_proj.weight"], values[f"{BLOCK}q_proj.weight"]
    )


def test_unmerged_state_dict(tmp_path: Path) -> None:
    """A PeftModel saved whole: `base_layer` and LoRA's tensors among the weights."""
    values = {f"base_model.model.{k}": v for k, v in sources.tensors(sources.config()).items()}
    values |= {name: value.numpy() for name, value in Q.items()}
    sources.write(tmp_path / "source", values, sources.config())
    with pytest.raises(CheckpointError, match=r"holds LoRA tensors \('.*lora_A"):
        convert(tmp_path / "source", tmp_path / "out")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources.make(tmp_path)
    adapter = str(write(tmp_path / "adapter", Q))
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "--adapter", adapter]
    assert convert_checkpoint.main(arguments) == 0
    assert "merged 1 tensors of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*arguments, "--reverse"])
    assert "cannot be given with --reverse" in capsys.readouterr().err
