"""Where a task's prompt is cut: with its question in the query, or refused by the task's name."""

from __future__ import annotations

import pytest

from pdllm_jax import ConfigError
from pdllm_jax.evaluation.prompts import SplitPrompt, TaskPrompt, find_last, split_by_rule
from tests.support.evals_data import RULER_PROMPTS

STORY = "Anne lives at Kellynch Hall. Her father reads the Baronetage.\n" * 20
OTHER = "Frederick has come back from the sea. " * 30
SHOT = f"Text: {OTHER}\n\nQuestion: Who came back?\nAnswer: Frederick\n\n"
CUE = "这是一份会议记录。" * 99


def task_prompt(prompt: str, doc: dict, task: str = "my_task") -> TaskPrompt:
    return TaskPrompt(prompt, (0, len(prompt)), doc, task)


def cut(prompt: str, doc: dict, field: str | None = None) -> SplitPrompt | None:
    task = task_prompt(prompt, doc)
    return task.split(field) or task.split_by_rule()


# Prompts as lm-eval's tasks make them: (prompt, doc, document, query).
SPLITS = {
    # babilong: the story is `input`, stripped; the question follows on a line.
    "babilong": (
        f"I will give you facts.\n\n<example>Who?</example>\n\n{STORY.strip()}\nWhere is Anne?",
        {"input": f" {STORY} ", "question": " Where is Anne? ", "target": "hall"},
        STORY.strip(),
        "\nWhere is Anne?",
    ),
    # LongBench's vcsum and lcc: what follows {context} is short, what to do stands before it.
    "vcsum": (
        f"下面有一段会议记录，请你写一段总结。\n会议记录：\n{CUE}\n\n会议总结：",
        {"context": CUE, "input": ""},
        CUE,
        "\n\n会议总结：",
    ),
    "lcc": (
        f"Please complete the code given below. \n{STORY}Next line of code:",
        {"context": STORY, "input": ""},
        STORY,
        "Next line of code:",
    ),
    # SCROLLS: `input` is the document of its summaries.
    "scrolls": (
        f"{STORY}\n\nQuestion: What is a summary of the preceding text?\nAnswer:",
        {"id": "1", "input": STORY},
        STORY,
        "\n\nQuestion: What is a summary of the preceding text?\nAnswer:",
    ),
    # An example with the same document in front.
    "twice": (
        f"{STORY}\nQ: Who reads?\nA: he\n\n{STORY}\nQ: Who lives there?\nA:",
        {"story": STORY, "question": "Who lives there?"},
        STORY,
        "\nQ: Who lives there?\nA:",
    ),
    # A short document whose words are in the question too.
    "in the question": (
        f"{'The sea. ' * 40}\n\nPassage: Anne\nQuestion: is Anne there?\nAnswer:",
        {"passage": "Anne", "question": "is Anne there"},
        "Anne",
        "\nQuestion: is Anne there?\nAnswer:",
    ),
    # Examples with documents in front are longer than the document, and join it.
    "examples": (
        f"Read the texts.\n\n{SHOT * 5}Text: {STORY}\n\nQuestion: Who reads?\nAnswer:",
        {"context": STORY, "question": "Who reads?"},
        f"{SHOT * 5}Text: {STORY}",
        "\n\nQuestion: Who reads?\nAnswer:",
    ),
    # A field that holds all of the prompt is not its document.
    "whole prompt": (
        f"Read this.\n\n{STORY}\n\nWho lives at Kellynch Hall?\nWords: The answer of this text is",
        {
            "prompt": f"Read this.\n\n{STORY}\n\nWho lives at Kellynch Hall?",
            "gen_prefix": "Words: The answer of this text is",
        },
        STORY,
        "\n\nWho lives at Kellynch Hall?\nWords: The answer of this text is",
    ),
    # The question lies further from the end than the last paragraph.
    "choices": (
        f"Read this.\n\n{STORY}\n\nWho lives at the hall?\n\n"
        + "\n\n".join(f"{x}) {'person ' * 30}" for x in "ABC"),
        {"question": "Who lives at the hall?", "other": "text"},
        STORY + "\n",
        "\nWho lives at the hall?\n\n" + "\n\n".join(f"{x}) {'person ' * 30}" for x in "ABC"),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_question_is_in_the_query(name):
    prompt, doc, document, query = SPLITS[name]
    split = cut(prompt, doc)
    assert "".join(split) == prompt
    assert split.after == query
    assert split.context == document


@pytest.mark.parametrize("task", RULER_PROMPTS)
def test_ruler_under_another_name_is_cut_by_rule(task):
    """lm-eval's `input` is the whole prompt; the response begins with `gen_prefix`."""
    before, text, after = RULER_PROMPTS[task]
    prompt = before + text * 60 + after
    doc = {"input": prompt, "outputs": ["x"], "gen_prefix": "The answer to this question is:"}
    split = cut(f"{prompt} {doc['gen_prefix']}", doc)
    assert split is not None
    assert after.strip() in split.after
    assert after.strip() not in split.context


@pytest.mark.parametrize(
    ("prompt", "doc"),
    [
        (STORY, {"context": STORY, "input": ""}),  # infinitebench_longbook_sum_en
        (f"{STORY}\nAnswer:", {"document": STORY}),
        (f"Question: Who?\n\n{STORY}\n\nAnswer:", {"context": STORY, "question": "Who?"}),
        (f"Who lives?\n\n{STORY}\n\n{OTHER}\n\nSo:", {"question": "Who lives?"}),
        (f"Do it.\n\n{STORY}\nWho?\n{STORY * 2}\n\nAnswer now:", {"query": "Who?"}),
    ],
)
def test_a_task_without_a_question_behind_its_document_is_refused(prompt, doc):
    with pytest.raises(ConfigError, match=r"'my_task'.*document=FIELD.*method=dual-cache"):
        cut(prompt, doc)


def test_the_document_can_be_named():
    doc = {"body": STORY, "question": "Who?"}
    split = cut(f"Who?\n\n{STORY}\nAnswer:", doc, "body")
    assert split == ("Who?\n\n", STORY, "\nAnswer:")
    for field in ("question", "missing"):
        with pytest.raises(ConfigError, match=f"no document '{field}' with a text behind it"):
            cut(f"Read.\n\n{STORY}", doc, field)


def test_a_cue_is_no_question():
    split = split_by_rule(f"Do this.\n\n{'Long line. ' * 99}\nWho lives in the hall?\n\nAnswer:")
    assert split.after == "\nWho lives in the hall?\n\nAnswer:"
    split = split_by_rule("Do this.\n\n" + "word " * 300 + "and say who. \n\nAnswer:")
    assert split.after.endswith("and say who. \n\nAnswer:")
    assert len(split.after) == 500


@pytest.mark.parametrize(
    ("prompt", "text", "place"),
    [
        ("a DOC b DOC c", "DOC", "DOC"),
        ("a one\n two b", " one two\n", "one\n two"),
        ("a b", "DOC", None),
        ("a b", " ", " "),
        ("ab", " ", None),
    ],
)
def test_where_a_text_occurs_last(prompt, text, place):
    got = find_last(prompt, text)
    assert (got and prompt[slice(*got)]) == place
    assert got is None or got[0] == prompt.rfind(place)
