"""The lexical gate: what an embedding cannot see between a question and its nearest neighbour. Pure; knows no vectors.

Sentence embeddings place "enable X" beside "disable X" (cosine up to 0.9997 for a negation, reference/router_cache §0)
and see no difference between 80 and 82. Each check below reads one kind of meaning out of both texts and objects
where they differ; objecting wrongly costs one answer, passing wrongly serves a false one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from cache.content_words import are_light, differ_by_prefix, meanings_of, roots_of
from cache.lexicon import (
    ANTONYMS,
    DEICTICS,
    DIRECTIONS,
    FORMATS,
    FUNCTION_WORDS,
    NEGATIONS,
    NUMBER_WORDS,
    PREPOSITIONS,
    PRONOUNS,
    SCALES,
    TIME_AND_MEASURE,
    TIMES,
    WH_WORDS,
)

MAX_CHARS = 2_000
"""Longer texts are not compared: the time of one comparison stays within a few milliseconds of the event loop."""


def objection(question: str, neighbour: str) -> str | None:
    """Why the answer to `neighbour` must not serve `question`, as a short token; None: nothing speaks against it.

    Symmetric, and None for equal texts. Takes texts of at most `MAX_CHARS` characters.
    """
    if question == neighbour:
        return None
    a, b = _read(question), _read(neighbour)
    for reason, agree in _CHECKS.items():
        if not agree(a, b):
            return reason
    return None


@dataclass(frozen=True, slots=True)
class _Reading:
    text: str
    words: tuple[str, ...]
    """Lower case, contractions undone, punctuation gone."""
    numbers: Counter[str]
    entities: frozenset[str]
    """Capitalised inside a sentence, or written as only names and identifiers are; lower case."""
    identifiers: frozenset[str]
    """As written: code, paths, flags, versions."""
    quotes: tuple[str, ...]
    material: str
    """What is introduced by a colon or stands on further lines: what the question is about, as it is written."""
    roots: frozenset[str]
    """Of the words that carry content, and their meanings: one for all synonyms."""
    meanings: frozenset[str]


# A word may hold inner dots, slashes and the like (paths, versions, T-shirt) but never ends in one.
_WORD = re.compile(r"--?\w[\w.+#-]*\w|[^\W_][\w]*(?:[.'’/:+&@#_-]+\w+)*[+#]*|_\w+", re.UNICODE)
_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+(?:\.\d+)+|\d+(?:\.\d+)?|\.\d+")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^“”\n]+)”|`([^`\n]+)`|«([^«»\n]+)»|(?<!\w)['‘]([^'‘’\n]+)['’](?!\w)")
_INTRODUCTION = re.compile(r"(?<!:)[::](?!\d|//|:)|\n")
"""A line break, or a colon that is not part of a time, an address or a name such as std::vector."""
_OPERATION = re.compile(r"\b(\w+)\s*([=<>!+*^|&~%]+|(?<=\d)\s*[-/]|(?<=\b\w)\s*[-/](?=\s*\w\b))\s*(?=(\w+))")
"""Both operands and what joins them; `-` and `/` join words too, so they count only between digits or letters."""
_SIGN = re.compile(r"(?<![\w-])-(?=\d)")
_PUNCTUATION = frozenset(".,:;!?…'\"`‘’“”«»()-–—/_")

_CONTRACTIONS = (
    (re.compile(r"\bcan['’]?t\b|\bcannot\b"), "can not"),
    (re.compile(r"\bwon['’]?t\b"), "will not"),
    (
        re.compile(r"\b(do|does|did|is|are|was|were|has|have|had|would|should|could|must|need|ai|might)n['’]?t\b"),
        r"\1 not",
    ),
    (re.compile(r"['’](?:s|m|re|ve|ll|d)\b"), ""),
)


@lru_cache(maxsize=256)
def _read(text: str) -> _Reading:
    plain = text.lower()
    for pattern, replacement in _CONTRACTIONS:
        plain = pattern.sub(replacement, plain)
    words = tuple(word.strip("'’") for word in _WORD.findall(plain))
    entities, identifiers = _names(text)
    quotes = tuple(next(part for part in match if part) for match in _QUOTED.findall(text))
    roots = roots_of(words)
    return _Reading(
        text=text,
        words=words,
        numbers=_numbers(plain, words),
        entities=entities,
        identifiers=identifiers,
        quotes=quotes,
        material=_material(text.strip()),
        roots=roots,
        meanings=meanings_of(roots),
    )


def _material(text: str) -> str:
    introduction = _INTRODUCTION.search(text)
    return "" if introduction is None else text[introduction.end() :].strip()


def _names(text: str) -> tuple[frozenset[str], frozenset[str]]:
    entities: set[str] = set()
    identifiers: set[str] = set()
    end_of_last = 0
    for match in _WORD.finditer(text):
        word = match[0]
        if _is_identifier(word):
            identifiers.add(word)
        elif _is_name(word, starts_sentence=end_of_last == 0 or _ends_sentence(text[end_of_last : match.start()])):
            entities.add(_stem(word.lower()))
        end_of_last = match.end()
    return frozenset(entities), frozenset(identifiers)


def _is_name(word: str, starts_sentence: bool) -> bool:
    if len(word) > 1 and word.isupper():
        return True  # "the US" is not "us"
    return word[0].isupper() and not starts_sentence and word.lower() not in FUNCTION_WORDS


def _ends_sentence(gap: str) -> bool:
    """Whether what stands between two words ends a sentence: a mark or a line end, then opening quotes at most."""
    before_quotes = gap.rstrip("\"'“(")
    marks = before_quotes.rstrip()
    return "\n" in before_quotes[len(marks) :] or marks.endswith((".", "!", "?", ":", ";"))


def _is_identifier(word: str) -> bool:
    """Written as no plain word is: snake_case, camelCase, v3.11, a/b.py, --flag, C++, or too long to be one."""
    if len(word) > 40 or word.startswith("--"):
        return True
    if any(mark in word for mark in "_@#+") or re.search(r"\w[./:]\w", word):
        return not _NUMBER.fullmatch(word)
    has_digit = any(c.isdigit() for c in word)
    has_letter = any(c.isalpha() for c in word)
    return (has_digit and has_letter and not re.fullmatch(r"\d+(st|nd|rd|th|s|k|m|%)?", word.lower())) or bool(
        re.search(r"[a-z][A-Z]", word)
    )


def _numbers(plain: str, words: Sequence[str]) -> Counter[str]:
    return Counter([*map(_canonical, _NUMBER.findall(plain)), *map(str, _spelled_numbers(words))])


def _spelled_numbers(words: Sequence[str]) -> list[int]:
    """The cardinals spelt out: "two hundred and five" is one number, "three and five" are two, a lone "one" is none."""
    found: list[int] = []
    total = current = num_words = 0
    after_scale = False
    for word in [*(part for compound in words for part in compound.split("-")), ""]:
        value = 1 if word == "one" else NUMBER_WORDS.get(word)
        is_tail = after_scale or (current % 100 >= 20 and current % 10 == 0 and value is not None and value < 10)
        if word == "and" and after_scale:
            continue
        if num_words and word not in SCALES and not (value is not None and is_tail):
            if num_words > 1 or current != 1:
                found.append(total + current)
            total = current = num_words = 0
        after_scale = word in SCALES
        if word in SCALES:
            scaled = (current or 1) * SCALES[word]
            total, current = (total, scaled) if SCALES[word] == 100 else (total + scaled, 0)
            num_words += 2  # a lone "hundred" counts
        elif value is not None:
            current += value
            num_words += 1
    return found


def _canonical(digits: str) -> str:
    whole, _, fraction = digits.replace(",", "").partition(".")
    if "." in fraction:  # a version, 3.11.2
        return digits
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def _stem(word: str) -> str:
    """Singular and plural, and a genitive, are one entity."""
    word = re.sub(r"['’]s?$", "", word)
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _same_numbers(a: _Reading, b: _Reading) -> bool:
    return a.numbers == b.numbers


def _same_operators(a: _Reading, b: _Reading) -> bool:
    """a < b is neither a > b nor b < a."""
    return _operations(a.text) == _operations(b.text)


def _operations(text: str) -> Counter[tuple[str, ...]]:
    operations = ((left, operator.strip(), right) for left, operator, right in _OPERATION.findall(text.lower()))
    return Counter([*operations, *((sign,) for sign in _SIGN.findall(text))])


def _same_symbols(a: _Reading, b: _Reading) -> bool:
    """An embedder knows no emoji and few signs: $5 is not €5, and 😀 not 😢."""
    return _symbols(a.text) == _symbols(b.text)


def _symbols(text: str) -> Counter[str]:
    return Counter(c for c in text if not (c.isalnum() or c.isspace() or c in _PUNCTUATION))


def _same_negation(a: _Reading, b: _Reading) -> bool:
    return sum(word in NEGATIONS for word in a.words) == sum(word in NEGATIONS for word in b.words)


def _same_polarity(a: _Reading, b: _Reading) -> bool:
    """On each axis the poles come in the same order; a text silent on an axis agrees with either pole of it."""
    axes_a, axes_b = _poles(a.words), _poles(b.words)
    return all(axes_a[axis] == axes_b[axis] for axis in axes_a.keys() & axes_b.keys())


def _poles(words: Sequence[str]) -> Mapping[int, list[int]]:
    poles: dict[int, list[int]] = {}
    for word in words:
        for axis, pole in ANTONYMS.get(word, ()):
            passed = poles.setdefault(axis, [])
            if passed[-1:] != [pole]:
                passed.append(pole)
    return poles


def _same_units(a: _Reading, b: _Reading) -> bool:
    return _agree_where_both_speak(
        {TIME_AND_MEASURE[w] for w in a.words if w in TIME_AND_MEASURE},
        {TIME_AND_MEASURE[w] for w in b.words if w in TIME_AND_MEASURE},
    )


def _agree_where_both_speak(a: set[str], b: set[str]) -> bool:
    return not a or not b or a == b


def _same_format(a: _Reading, b: _Reading) -> bool:
    """The language or form that is asked for: "in French", "as JSON"."""
    return {w for w in a.words if w in FORMATS} == {w for w in b.words if w in FORMATS}


def _same_question_word(a: _Reading, b: _Reading) -> bool:
    return _agree_where_both_speak(_wh(a.words), _wh(b.words))


def _wh(words: Sequence[str]) -> set[str]:
    asked = {WH_WORDS[word] for word in words if word in WH_WORDS}
    return asked | {"quantity" for first, second in pairwise(words) if first == "how" and second in ("many", "much")}


def _same_entities(a: _Reading, b: _Reading) -> bool:
    """What one capitalises the other at least mentions: users do not agree on capitals, only on names."""
    return _mentions(b, a.entities) and _mentions(a, b.entities)


def _mentions(reading: _Reading, names: frozenset[str]) -> bool:
    if not names:
        return True
    mentioned = {_stem(part) for word in reading.words for part in (word, *re.split(r"[-/.]", word))}
    joined = "".join(reading.words)
    return all(name in mentioned or (len(name) > 3 and name in joined) for name in names)


def _same_identifiers(a: _Reading, b: _Reading) -> bool:
    return _has_all(b, a.identifiers) and _has_all(a, b.identifiers)


def _has_all(reading: _Reading, identifiers: frozenset[str]) -> bool:
    """Each is written there too, as it is or as a plain word in lower case: getURL is not getUrl."""
    others = {identifier.lower() for identifier in reading.identifiers}
    return all(
        identifier in reading.identifiers or (identifier.lower() in reading.words and identifier.lower() not in others)
        for identifier in identifiers
    )


def _same_quotes(a: _Reading, b: _Reading) -> bool:
    """Letter for letter; one of the two may have left the marks out."""
    if a.quotes and b.quotes:
        return a.quotes == b.quotes
    return all(quote in b.text for quote in a.quotes) and all(quote in a.text for quote in b.quotes)


def _same_direction(a: _Reading, b: _Reading) -> bool:
    """ "from A to B" is not "from B to A": after one preposition stand two words that both texts hold."""
    after_a, after_b = _after_prepositions(a.words), _after_prepositions(b.words)
    words_a, words_b = set(a.words), set(b.words)
    for preposition in after_a.keys() & after_b.keys():
        only_a, only_b = after_a[preposition] - after_b[preposition], after_b[preposition] - after_a[preposition]
        if only_a & words_b and only_b & words_a:
            return False
    return True


def _after_prepositions(words: Sequence[str]) -> Mapping[str, set[str]]:
    after: dict[str, set[str]] = {}
    pending: list[str] = []
    for word in words:
        if word in DIRECTIONS:
            pending.append(word)
        elif word not in FUNCTION_WORDS:
            for preposition in pending:
                after.setdefault(preposition, set()).add(word)
            pending = []
    return after


def _same_order(a: _Reading, b: _Reading) -> bool:
    """The same words in another order ask something else: "do cats eat mice", "do mice eat cats"."""
    order_a, order_b = _ordered(a.words), _ordered(b.words)
    return order_a == order_b or sorted(order_a) != sorted(order_b)


def _ordered(words: Sequence[str]) -> list[str]:
    """The words whose order carries meaning; the two that "and" or "or" joins have none among themselves."""
    ordered: list[str] = []
    joins = False
    for word in words:
        if word in ("and", "or"):
            joins = bool(ordered)
        elif word in PRONOUNS or word in PREPOSITIONS or word not in FUNCTION_WORDS:
            ordered.append(PRONOUNS.get(word) or _stem(word))
            if joins:
                ordered[-2:] = sorted(ordered[-2:])
            joins = False
    return ordered


def _same_foreign_words(a: _Reading, b: _Reading) -> bool:
    """Scripts that an English embedder reads as unknown tokens must agree word for word."""
    return Counter(w for w in a.words if _is_foreign(w)) == Counter(w for w in b.words if _is_foreign(w))


def _is_foreign(word: str) -> bool:
    return any(ord(c) > 0x24F and c.isalnum() for c in word)  # beyond Latin Extended-B


def _same_material(a: _Reading, b: _Reading) -> bool:
    return a.material == b.material


def _same_deictics(a: _Reading, b: _Reading) -> bool:
    """ "this month" is not "last month"."""
    return _deictics(a.words) == _deictics(b.words)


def _deictics(words: Sequence[str]) -> set[str]:
    found = {DEICTICS[word] for word in words if word in DEICTICS}
    is_now = any(word in ("this", "these") and _stem(following) in TIMES for word, following in pairwise(words))
    return found | {"current"} if is_now else found


def _same_but_for_prefixes(a: _Reading, b: _Reading) -> bool:
    return not differ_by_prefix(a.roots, b.roots)


def _none_adds_a_word(a: _Reading, b: _Reading) -> bool:
    """Who only adds to a question narrows it: the Congo has a Republic and a Democratic Republic."""
    only_a, only_b = a.meanings - b.meanings, b.meanings - a.meanings
    return bool(only_a and only_b) or are_light(only_a | only_b)


def _none_replaces_one_word(a: _Reading, b: _Reading) -> bool:
    """Where all agrees but one word, neither a form nor a synonym of its counterpart, the two ask about that word."""
    return not (len(a.meanings - b.meanings) == len(b.meanings - a.meanings) == 1)


_CHECKS: Mapping[str, Callable[[_Reading, _Reading], bool]] = {
    "numbers": _same_numbers,
    "negation": _same_negation,
    "polarity": _same_polarity,
    "units": _same_units,
    "identifiers": _same_identifiers,
    "entities": _same_entities,
    "quotes": _same_quotes,
    "operators": _same_operators,
    "symbols": _same_symbols,
    "format": _same_format,
    "question-word": _same_question_word,
    "direction": _same_direction,
    "order": _same_order,
    "script": _same_foreign_words,
    "material": _same_material,
    "deictic": _same_deictics,
    "prefix": _same_but_for_prefixes,
    "added-word": _none_adds_a_word,
    "replaced-word": _none_replaces_one_word,
}
