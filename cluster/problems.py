"""What is wrong with a configuration: every mistake with its key and its line, in words that give no secret away.

Knows YAML's nodes and pydantic's errors. What is checked is `config.py`'s and `references.py`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

Loc = tuple[int | str, ...]

HOLDS_ITSELF = "refers to a list or mapping that it is part of"

_WORDS_OF_AUTH = frozenset({"auth", "keys", "keys_file", "tenant", "sha256"})
_CONTAINER_ERRORS = frozenset({"model_type", "model_attributes_type", "dict_type", "tuple_type"})


@dataclass(frozen=True, slots=True)
class Mistake:
    loc: Loc
    message: str


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    """1-based; 0 where the mistake has no place in a file."""
    key: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.key}: {self.message}" if self.key else f"{where}{self.message}"


class ConfigError(Exception):
    """One or more mistakes in a configuration; `str()` has a line for each."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(f"{source}: {p}" for p in problems))
        self.problems = tuple(problems)


def problems_in(tree: yaml.Node | None, mistakes: Iterable[Mistake]) -> list[Problem]:
    """In the order of their lines, where `tree` is the YAML that was checked."""
    found = [Problem(line_of(tree, m.loc), dotted(m.loc), m.message) for m in mistakes]
    return sorted(found, key=lambda problem: problem.line)


def mistakes_of(error: ValidationError, schema: type[BaseModel], at: Loc = ()) -> list[Mistake]:
    """Every mistake of a value of `schema`, which stands at `at`."""
    errors = error.errors()
    # An invalid item also makes its list look too short; the item's own mistake is the one to report.
    places = {tuple(e["loc"]) for e in errors}
    return [
        Mistake((*at, *e["loc"]), _message(e, schema, (*at, *e["loc"])))
        for e in errors
        if not (e["type"] == "too_short" and any(p[: len(e["loc"])] == e["loc"] and p != e["loc"] for p in places))
    ]


def line_of(tree: yaml.Node | None, loc: Loc) -> int:
    """The line of the deepest part of `loc` that stands in the file."""
    node, line = tree, (tree.start_mark.line + 1 if tree else 0)
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = {str(key.value): (key, value) for key, value in node.value}
            if str(part) not in pairs:
                break
            key, node = pairs[str(part)]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def dotted(loc: Loc) -> str:
    """A word that `auth` does not know may be a key that was written into the wrong place."""
    is_auth = loc[:1] == ("auth",)
    return ".".join(str(p) if not is_auth or isinstance(p, int) or p in _WORDS_OF_AUTH else "…" for p in loc)


def tree_mistakes(tree: yaml.Node | None) -> list[Mistake]:
    """Keys that stand twice, and nodes that hold themselves."""
    return _node_mistakes(tree, (), (), set())


def _node_mistakes(node: yaml.Node | None, loc: Loc, around: tuple[int, ...], seen: set[int]) -> list[Mistake]:
    if id(node) in around:
        return [Mistake(loc, HOLDS_ITSELF)]
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return []
    seen.add(id(node))
    around = (*around, id(node))
    found: list[Mistake] = []
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            found += _node_mistakes(item, (*loc, i), around, seen)
        return found
    keys: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in keys:
            found.append(Mistake((*loc, name), "stands twice"))
        keys.add(name)
        found += _node_mistakes(value, (*loc, name), around, seen)
    return found


def _message(error: Any, schema: type[BaseModel], loc: Loc) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown key" + _suggestion(schema, error["loc"])
    if kind == "missing":
        return "is required"
    if kind in ("model_type", "model_attributes_type"):
        return "should be a mapping"
    message: str = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = message[0].lower() + message[1:]
    if kind == "value_error" or kind in _CONTAINER_ERRORS or _is_secret(loc):
        return message
    value = error.get("input")
    return message if isinstance(value, dict | list | tuple) else f"{message}, got {value!r}"


def _is_secret(loc: Loc) -> bool:
    return loc[:1] == ("auth",) or "redis_url" in loc


def _suggestion(schema: type[BaseModel], loc: Loc) -> str:
    section: Any = schema
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        inner = [a for a in (*getattr(annotation, "__args__", ()), annotation) if hasattr(a, "model_fields")]
        if not inner:
            return ""
        section = inner[0]
    close = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(section.model_fields)}"
