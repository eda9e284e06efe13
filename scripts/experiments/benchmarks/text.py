"""Normalisation and F1 of LongBench and InfiniteBench (SQuAD's, and its Chinese form)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ENGLISH = str.maketrans("", "", string.punctuation)
# The full-width and Chinese marks that both benchmarks drop.
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜"
    "〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def english_words(text: str) -> list[str]:
    """Splits lower-case text, without ASCII punctuation and then articles, at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_ENGLISH)).split()


def chinese_characters(text: str) -> str:
    """Returns lower-case text without punctuation of both kinds and white space."""
    return "".join(text.lower().translate(_CHINESE).split())


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Returns F1 of two bags of tokens; 0 where they share none, or one is empty."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def english_f1(prediction: str, answer: str) -> float:
    """Returns token F1 after normalisation."""
    return f1(english_words(prediction), english_words(answer))
