"""Which words of a text carry what it says, each in one form whatever its inflection and spelling. Pure.

Light on purpose: two words that should have been one cost an answer, no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from itertools import pairwise

from cache.lexicon import (
    FILLERS,
    FUNCTION_WORDS,
    IRREGULAR_FORMS,
    LIGHT_WORDS,
    NEGATIONS,
    NUMBER_WORDS,
    OPPOSING_PREFIXES,
    SCALES,
    SYNONYMS,
    TIME_AND_MEASURE,
)

_COMPOUND = re.compile(r"[-/]")
_GENITIVE = re.compile(r"['’]s?$")
_ENDING = re.compile(r"(?<=...)(?:ing|ed)$")
_VOWEL = re.compile(r"[aeiouy]")
_DOUBLED = re.compile(r"([^aeioulsz])\1$")
_SPELLINGS = (
    (re.compile(r"(?<=..)our(?=$|it|abl|ful)"), "or"),
    (re.compile(r"(?<=..)tr$"), "ter"),
    (re.compile(r"(?<=..)is(?=$|ation$)"), "iz"),
    (re.compile(r"(?<=..)ys$"), "yz"),
    (re.compile(r"y$"), "i"),
)
"""Of what endings leave: British to American, and "easy" to the rest of "easily"."""
_MIN_BASE = 2
_GOOD_WAYS = frozenset((good, way) for good in ("good", "best", "better") for way in ("way", "ways"))
""" "What is the best way to" asks no more than "how do I"."""

# Numbers and negations are compared by checks of their own.
_EMPTY = FUNCTION_WORDS | FILLERS | NEGATIONS | NUMBER_WORDS.keys() | SCALES.keys()


def roots_of(words: Sequence[str]) -> frozenset[str]:
    """Of the content words; `words` are in lower case."""
    telling = (word for word, following in pairwise([*words, ""]) if (word, following) not in _GOOD_WAYS)
    parts = (part for word in telling if word not in _EMPTY for part in _COMPOUND.split(word))
    return frozenset(root for part in parts if (root := _content_root(part)))


def meanings_of(roots: Iterable[str]) -> frozenset[str]:
    """One root for all that are synonyms."""
    return frozenset(_SYNONYM_OF.get(root, root) for root in roots)


def are_light(meanings: Iterable[str]) -> bool:
    """Whether they add nothing to a question that is the same without them."""
    return all(meaning in _LIGHT for meaning in meanings)


def differ_by_prefix(some: Set[str], others: Set[str]) -> bool:
    """Whether of the roots that only one side holds two are alike but for a prefix: overweight and underweight."""
    bases = {base for root in some - others for base in _bases(root)}
    return any(base in bases for root in others - some for base in _bases(root))


def _bases(root: str) -> list[str]:
    prefixes = [p for p in OPPOSING_PREFIXES if root.startswith(p) and len(root) - len(p) >= _MIN_BASE]
    return [root, *(_root(_whole(root.removeprefix(p))) for p in prefixes)]


@lru_cache(maxsize=8192)
def _content_root(word: str) -> str | None:
    whole = _whole(word)
    return _root(whole) if whole and whole not in _EMPTY and not whole[0].isdigit() else None


def _whole(word: str) -> str:
    """The word whose form it is, where the form is irregular; the unit, where it names one."""
    word = _GENITIVE.sub("", word)
    return IRREGULAR_FORMS.get(word) or TIME_AND_MEASURE.get(word, word)


def _root(word: str) -> str:
    """What plural, tense, -ly and the two ways of spelling leave of it; need not be a word."""
    if len(word) > 4 and word.endswith(("ies", "ied")):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        word = word[:-1]
    stem = _ENDING.sub("", word)
    if stem != word and _VOWEL.search(stem):
        word = _DOUBLED.sub(r"\1", stem)
    if len(word) > 5:
        word = word.removesuffix("ly")
    if len(word) > 2:
        word = word.removesuffix("e")
    for spelling, ours in _SPELLINGS:
        word = spelling.sub(ours, word)
    return word


_SYNONYM_OF = {_root(word): _root(group[0]) for group in SYNONYMS for word in group}
_LIGHT = meanings_of(_root(_whole(word)) for word in LIGHT_WORDS)
