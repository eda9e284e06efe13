"""Broken text: tokenizers, prompt files, benchmarks' JSON lines, and records of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import options
from experiments.benchmarks import infinitebench, longbench, ruler
from experiments.benchmarks.example import DataError, Malformed, Task
from experiments.records import FORMAT, RecordError, Records

from campaigns import samples
from campaigns.kind import Kind, require
from campaigns.mutate import mutated_bytes, mutated_json
from pdllm_jax.config import ChunkConfig
from pdllm_jax.method.chunking import check_token_ids, chunk_prompt
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.tokenizer import Tokenizer, TokenizerError


class Tokenizers(Kind):
    """tokenizer.json or tokenizer_config.json, loaded and used on text."""

    name = "tokenizer"
    refusals = (TokenizerError,)
    TEXT = "Anne: <|mdm_mask|> caf\u00e9 \U0001f600\n"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        samples.write_tokenizer(folder)
        self.config = ModelConfig.from_dict(samples.config())
        self.paths = folder / "tokenizer.json", folder / "tokenizer_config.json"
        self.good = tuple(path.read_bytes() for path in self.paths)
        # What tokenizer.json files also hold, so that there is something to break.
        plain = json.loads(self.good[0])
        rich = {
            **plain,
            "truncation": {
                "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
            },
            "padding": {
                "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 257, "pad_type_id": 0, "pad_token": "<|endoftext|>",
            },
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+"}, "behavior": "Isolated",
                 "invert": False},
                plain["pre_tokenizer"],
            ]},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": True,
                               "trim_offsets": False, "use_regex": True},
        }  # fmt: skip
        rich["model"] = {**plain["model"], "merges": [["A", "n"], ["n", "e"]]}
        # In the places of two bytes, so that the special tokens keep theirs.
        names = {254: "An", 255: "ne"}
        vocab = {names.get(i, symbol): i for symbol, i in plain["model"]["vocab"].items()}
        rich["model"]["vocab"] = vocab
        self.choices = self.good[0], json.dumps(rich).encode()
        self.contents = self.good

    def write(self, rng: Random) -> None:
        first, second = rng.choice(self.choices), self.good[1]
        if rng.random() < 0.8:
            first = mutated_json(rng, first)
        else:
            second = mutated_json(rng, second)
        self.contents = first, second
        for path, content in zip(self.paths, self.contents, strict=True):
            path.write_bytes(content)

    def load(self) -> tuple[Tokenizer, list[int], tuple[list[int], list[int]]]:
        tokenizer = Tokenizer.load(self.folder, self.config)
        ids = tokenizer.encode(self.TEXT * 8)
        tokenizer.decode(ids)
        return tokenizer, ids, tokenizer.around_document("Who?")

    def check(self, loaded: tuple[Tokenizer, list[int], tuple[list[int], list[int]]]) -> None:
        tokenizer, ids, (prefix, query) = loaded
        raw = json.loads(self.contents[0])
        require(tokenizer.digest == hashlib.sha256(self.contents[0]).hexdigest(), "digest")
        vocabulary = raw["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            for row in raw["added_tokens"]:
                found = tokenizer.backend.token_to_id(row["content"])
                require(found == row["id"], f"{row['content']!r} has another id")
            known = {*vocabulary.values(), *(row["id"] for row in raw["added_tokens"])}
            require(known.issuperset([*ids, *query, *prefix[1:]]), "ids that no token has")
        require(tokenizer.mask_id == self.config.mask_token_id, "another mask token")
        require(prefix[0] == tokenizer.bos_id, "no BOS in front")
        # Text is never cut short or filled up, whatever the file asks for.
        require(tokenizer.backend.truncation is None, "text would be truncated")
        require(tokenizer.backend.padding is None, "text would be padded")


class Prompts(Kind):
    """The file of --prompt-ids, up to the chunks that are encoded."""

    name = "prompt"
    refusals = (ValueError,)
    CHUNKS = ChunkConfig(8)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "prompt.json"
        rng = Random(0)
        parts = {
            "prefix": [256, 1, 2], "context": [rng.randrange(250) for _ in range(30)],
            "query": [5, 6, 7],
        }  # fmt: skip
        self.good = json.dumps(parts).encode(), json.dumps({"prompt": [1, 2, 3]}).encode()
        self.content = self.good[0]
        self.method = "prefilling"
        self.path.write_bytes(self.content)

    def write(self, rng: Random) -> None:
        bare = rng.random() < 0.25
        self.method = rng.choice(("prefilling", "plain"))
        self.content = mutated_json(rng, self.good[bare])
        self.path.write_bytes(self.content)

    def load(self) -> Any:
        read = options.read_prompt_ids(self.path, self.method)
        ids = [
            check_token_ids(name, part, 264)
            for name, part in zip(("prefix", "context", "query"), read, strict=True)
        ]
        return read, ids, chunk_prompt(*ids, self.CHUNKS) if self.method == "prefilling" else None

    def check(self, loaded: Any) -> None:
        read, ids, prompt = loaded
        raw = json.loads(self.content)
        says = [[], [], raw["prompt"]] if "prompt" in raw else [
            raw["prefix"], raw["context"], raw["query"]
        ]  # fmt: skip
        require([list(part) for part in read] == says, "other ids")
        require([part.tolist() for part in ids] == says, "other ids after the check")
        require(all(type(i) is int and 0 <= i < 264 for part in says for i in part), "no ids")
        if prompt is not None:
            n = prompt.chunk_lengths[0].tolist()
            rows = [row[1:k] for row, k in zip(prompt.chunks[0].tolist(), n, strict=True) if k]
            whole = [token for row in rows for token in row]
            require(whole == says[1], "the document was not cut as it is")


class Benchmarks(Kind):
    """Files of LongBench, InfiniteBench and RULER, bad lines skipped or not."""

    name = "benchmark"
    refusals = (DataError,)
    PROMPTS: ClassVar = {"hotpotqa": "Passages.\n{context}\n\nQuestion: {input}\nAnswer:"}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = samples.SENTENCES * 2
        row = {
            "input": "Where?", "context": text, "answers": ["Kellynch Hall"], "length": 40,
            "all_classes": None, "_id": "a1",
        }  # fmt: skip
        options = {
            "id": 0, "context": text, "input": "Who?", "answer": ["Mary"],
            "options": ["Anne", "Mary", "Louisa", "B"],
        }  # fmt: skip
        magic = {
            "index": 0, "outputs": ["12345"], "length": 9, "answer_prefix": " Answer:",
            "input": "A special magic number is hidden within the following text. I will quiz you "
            f"about the number afterwards.\n{text}\nWhat is the special magic number for k?",
        }  # fmt: skip
        self.files = {
            "longbench": folder / "hotpotqa.jsonl",
            "infinitebench": folder / "code_debug.jsonl",
            "ruler": folder / "niah_single_1.jsonl",
        }
        self.rows = {"longbench": row, "infinitebench": options, "ruler": magic}
        self.settings = folder / "dataset2prompt.json"
        self.good_settings = json.dumps(self.PROMPTS).encode()
        (folder / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 8}))
        self.benchmark, self.then = "longbench", "stop"
        self.content = b""
        self._put(json.dumps(row).encode(), self.good_settings)

    def _put(self, content: bytes, settings: bytes) -> None:
        self.content = content
        self.files[self.benchmark].write_bytes(content)
        self.settings.write_bytes(settings)

    def write(self, rng: Random) -> None:
        self.benchmark = rng.choice(list(self.files))
        self.then = rng.choice(("stop", "skip"))
        good = json.dumps(self.rows[self.benchmark]).encode()
        settings = self.good_settings
        if self.benchmark == "longbench" and rng.random() < 0.3:
            settings = mutated_json(rng, settings)
        lines = [mutated_json(rng, good) if rng.random() < 0.6 else good for _ in range(3)]
        content = b"\n".join(lines)
        self._put(mutated_bytes(rng, content) if rng.random() < 0.2 else content, settings)

    def load(self) -> tuple[list[Task], Malformed]:
        malformed = Malformed(self.then, lambda line: require("\n" not in line, "several lines"))
        task = [self.files[self.benchmark].stem]
        if self.benchmark == "longbench":
            return longbench.load(self.folder, task, malformed, self.folder), malformed
        module = infinitebench if self.benchmark == "infinitebench" else ruler
        return module.load(self.folder, task, malformed), malformed

    def check(self, loaded: tuple[list[Task], Malformed]) -> None:
        (task,), malformed = loaded
        good = []
        lines = [line for line in self.content.split(b"\n") if line.strip()]
        for line in lines:
            try:
                raw = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                continue
            if isinstance(raw, dict):
                good.append(raw)
        require(len(task.examples) <= len(good), "more examples than lines")
        require(len(task.examples) + malformed.count <= len(lines), "lines counted twice")
        require(self.then == "skip" or malformed.count == 0, "skipped without being asked")
        contexts = [str(raw.get("context", raw.get("content", raw.get("input")))) for raw in good]
        for example in task.examples:
            require(any(example.prompt.context in text for text in contexts), "another document")
            require(
                bool(example.answers) and all(type(a) is str for a in example.answers), "answers"
            )
            require(0.0 <= task.metric("Kellynch Hall", example) <= 1.0, "a score outside [0, 1]")
            require(len(example.digest()) == 16, "digest")
        require(len({e.id for e in task.examples}) == len(task.examples), "ids that are not unique")


class RunRecords(Kind):
    """records.jsonl and settings.json of an experiment."""

    name = "records"
    refusals = (RecordError,)
    SETTINGS: ClassVar = {"seed": 0, "chunking": {"chunk_size": 64}}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path, self.settings = folder / "records.jsonl", folder / "settings.json"
        key = {"benchmark": "b", "task": "t", "method": "plain"}
        rows: list[dict[str, Any]] = [{"run": {"device": "cpu"}}]
        rows += [
            {**key, "id": str(i), "digest": "d", "score": i / 2, "tokens": [1]} for i in range(3)
        ]
        self.rows = [json.dumps(row).encode() for row in rows]
        self.kept = b"\n".join([*self.rows, b""])
        self._put(self._settings())

    def _settings(self) -> bytes:
        return json.dumps({"format": FORMAT, **self.SETTINGS}).encode()

    def _put(self, settings: bytes) -> None:
        self.path.write_bytes(self.kept)
        self.settings.write_bytes(settings)

    def write(self, rng: Random) -> None:
        kind, lines = rng.randrange(3), self.rows
        if kind == 0:
            lines = [mutated_json(rng, x) if rng.random() < 0.5 else x for x in lines]
        content = b"\n".join(lines) + b"\n"
        if kind == 1:
            content = mutated_bytes(rng, content)
        self.kept = content[: rng.randrange(len(content) + 1)] if kind == 2 else content
        settings = self._settings()
        self._put(mutated_json(rng, settings) if rng.random() < 0.2 else settings)

    def load(self) -> Any:
        with Records(self.folder, self.SETTINGS) as records:
            return records.done, records.dropped

    def check(self, loaded: Any) -> None:
        done, dropped = loaded
        *lines, rest = self.kept.split(b"\n")
        require(dropped == len(rest), "other than the last line was dropped")
        rows = [row for row in map(json.loads, lines) if "run" not in row]
        says = {(r["benchmark"], r["task"], r["method"], r["id"]): r for r in rows}
        require(repr({tuple(k): v for k, v in done.items()}) == repr(says), "other records")
        left = self.path.read_bytes()
        require(left == self.kept[: len(self.kept) - dropped], "records were changed")


KINDS = (Tokenizers, Prompts, Benchmarks, RunRecords)
