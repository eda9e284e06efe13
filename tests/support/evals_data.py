"""Local copies of benchmarks as the tests make them: a few lines in every shape that exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PROMPTS = {
    "hotpotqa": "Passages.\n{context}\n\nQuestion: {input}\nAnswer:",
    "trec": "Examples.\n\n{context}\n{input}",
    "gov_report": "Report:\n{context}\n\nSummary:",
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "passage_retrieval_en": "{context}\n\nAbstract:\n{input}\n\nThe answer is: ",
    "multifieldqa_zh": "阅读：\n\n{context}\n\n问题：{input}\n回答：",
}
LENGTHS = dict.fromkeys(PROMPTS, 8)
TEXT = "Anne lives at Kellynch Hall with {braces} in it. The sea is blue at Lyme. "


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Objects as JSON lines; bytes and strings as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    lines = [text.encode() if isinstance(text, str) else text for text in texts]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def longbench(folder: Path) -> Path:
    """The published fields, a mirror's, and what may be missing."""
    full = {
        "input": "Where does Anne live?",
        "context": TEXT * 3,
        "length": 40,
        "_id": "a1",
        "answers": ["Kellynch Hall", "K"],
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
    }
    mirror = {"question": full["input"], "context": TEXT, "answers": ["Hall"], "length": "5000"}
    plain = {"input": "Who?", "context": TEXT * 2, "answers": "Anne", "_id": "a1", "length": "9"}
    code, context = {"answers": ["x = 1"]}, {"context": TEXT}
    classes = {"all_classes": ["Food", "Sport"], "input": "Question: x\nType:", **context}
    chinese = {"input": "谁？", "context": "安妮住在凯林奇。" * 3, "answers": ["安妮"]}
    for task, rows in {
        "hotpotqa": [full, mirror, "", plain],
        "hotpotqa_e": [full, mirror, "", plain],
        "trec": [{**classes, "answers": ["Food"]}],
        "lcc": [{**code, **context, "input": ""}],
        "gov_report": [{**code, **context}],
        "passage_retrieval_en": [{"input": "s", "answers": ["Paragraph 2"], **context}],
        "multifieldqa_zh": [chinese],
    }.items():
        write_lines(folder / "data" / f"{task}.jsonl", rows)
    for name, content in (("dataset2prompt", PROMPTS), ("dataset2maxlen", LENGTHS)):
        write_lines(folder / "config" / f"{name}.json", [content])
    return folder


def infinitebench(folder: Path) -> Path:
    """Answers as texts, numbers and lists; options with the answer in each of its forms."""
    key = {"context": TEXT, "input": "What is the pass key?"}
    other = {"content": TEXT, "input": "?", "options": []}
    options = {"options": ["Anne", "Mary", "Louisa", "B"], "id": 3}
    book = {**options, "question": "Who?", "context": TEXT}
    answers = ["Mary", ["Mary"], ["Mary", "B"]]
    for task, rows in {
        "passkey": [
            {"id": 0, **key, "answer": "71432"},
            {"id": 1, **key, "answer": 71432},
            {"id": 2, **other, "answer": ["71432"]},
        ],
        "number_string": [{"id": 0, **key, "answer": ["0712345678"]}],
        "kv_retrieval": [{"id": 0, **key, "answer": "ab-c"}],
        "code_debug": [{**options, **key, "answer": answer} for answer in answers],
        "longbook_choice_eng": [{**book, "answer": answer} for answer in [*answers, "C"]],
        "longbook_qa_eng": [{**key, "answer": ["Anne", "Anne Elliot"]}],
        "longbook_qa_chn": [{**key, "answer": ["安妮"]}],
    }.items():
        write_lines(folder / f"{task}.jsonl", rows)
    return folder


RULER_PROMPTS = {
    "niah_single_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        TEXT + "One of the special magic numbers for k is: 12345.",
        "\nWhat is the special magic number for k mentioned in the provided text?",
    ),
    "niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n",
        TEXT,
        "\nWhat are all the special magic numbers for k mentioned in the provided text?",
    ),
    "vt": (
        " Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        "VAR A = 1\nQuestion: Find all variables that are assigned the value 1. A\n\n" + TEXT,
        "\nQuestion: Find all variables that are assigned the value 2 in the text above.",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n",
        "1. sea 2. hall 3. sea",
        "\nQuestion: What are the 10 most common words in the above list?",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. ",
        "... abc ... def",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are",
    ),
    "qa_1": (
        "Answer the question based on the given documents. Only give me the answer.\n\n"
        "The following are given documents.\n\n",
        "Document 1:\n" + TEXT,
        "\n\nAnswer the question based on the given documents. Only give.\n\nQuestion: Who?",
    ),
}


def ruler(folder: Path) -> Path:
    """Both places of a file; with answer_prefix, without, and with it in the prompt already."""
    for task, parts in RULER_PROMPTS.items():
        row = {"index": 0, "input": "".join(parts), "outputs": ["12345", "Anne"], "length": 99}
        start = {"answer_prefix": " Answer:"}
        rows = [row, {**row, **start, "index": 1}]
        rows.append({**row, **start, "index": 2, "input": row["input"] + " Answer:"})
        place = f"{task}.jsonl" if task == "vt" else f"{task}/validation.jsonl"
        write_lines(folder / place, rows)
    return folder


def corpora(folder: Path, tokenizer_file: Path) -> Path:
    """What small_model/corpus.py writes, of a few sentences in bytes."""
    import numpy as np
    import tokenizers

    from small_model.corpus import NOISE, vocabulary_marks

    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    for name, text in (("persuasion", TEXT * 40), ("pydoc", TEXT * 40), ("noise", NOISE * 40)):
        np.save(folder / f"{name}.npy", ids(text))
    np.save(folder / "marks.npy", vocabulary_marks(tokenizer))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = {kind: [kind + a + b for a in letters for b in letters] for kind in ("adj", "noun")}
    (folder / "words.json").write_text(
        json.dumps({"adjectives": words["adj"], "nouns": words["noun"]}), encoding="utf-8"
    )
    return folder


def multifieldqa(folder: Path, characters: int, examples: int) -> Path:
    """A file of MultiFieldQA-en's shape, of the novel in examples/, a sentence planted in each."""
    text = (ROOT / "examples" / "persuasion.txt").read_text(encoding="utf-8")
    rows = []
    for i in range(examples):
        part, fact = (
            text[2000 * i :][:characters],
            f"The magic number for badger-{i} is {7000 + i}.",
        )
        place = part.index(" ", len(part) * (i + 1) // (examples + 1))
        row = {"dataset": "multifieldqa_en", "language": "en", "all_classes": None}
        row |= {"_id": f"made-{i}", "length": len(part.split()), "answers": [str(7000 + i)]}
        row |= {"input": f"What is the magic number for badger-{i}?"}
        rows.append({**row, "context": f"{part[:place]} {fact}{part[place:]}"})
    return write_lines(folder / "multifieldqa_en.jsonl", rows)
