"""What must agree between the parts of a configuration, checked over plain data that may be wrong in any other way.

Names each value by its `repr`, which of one that came out of the environment shows how it stands in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.problems import Loc, Mistake

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def reference_mistakes(data: Mapping[str, Any]) -> list[Mistake]:
    models = [_mapping(model) for model in _items(data.get("models"))]
    ids = [name for model in models if isinstance(name := model.get("id"), str)]
    return [
        *_names_taken(models),
        *_unknown_fallbacks(models, ids),
        *_gpus_without_a_gpu(models),
        *_unknown_default(_mapping(data.get("routing")), ids),
        *_open_to_everybody(_mapping(data.get("server")), _mapping(data.get("auth"))),
    ]


def _names_taken(models: Sequence[Mapping[str, Any]]) -> Iterator[Mistake]:
    names = {"auto"}
    for i, model in enumerate(models):
        places: list[tuple[Loc, Any]] = [(("id",), model.get("id"))]
        places += [(("aliases", j), alias) for j, alias in enumerate(_items(model.get("aliases")))]
        for place, name in places:
            if not isinstance(name, str):
                continue
            if name in names:
                yield Mistake(("models", i, *place), f"the name {name!r} is taken; every id and alias must differ")
            names.add(name)


def _unknown_fallbacks(models: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> Iterator[Mistake]:
    for i, model in enumerate(models):
        for j, fallback in enumerate(_items(model.get("fallbacks"))):
            if isinstance(fallback, str) and (fallback not in ids or fallback == model.get("id")):
                yield Mistake(("models", i, "fallbacks", j), f"{fallback!r} is not the id of another model")


def _gpus_without_a_gpu(models: Sequence[Mapping[str, Any]]) -> Iterator[Mistake]:
    for i, model in enumerate(models):
        num_gpus = model.get("num_gpus")
        if _mapping(model.get("engine")).get("device") == "cpu" and isinstance(num_gpus, int | float) and num_gpus > 0:
            yield Mistake(
                ("models", i, "num_gpus"),
                f"{num_gpus:g} GPUs are asked for, yet engine.device is cpu; leave one of the two out",
            )


def _unknown_default(routing: Mapping[str, Any], ids: Sequence[str]) -> Iterator[Mistake]:
    default = routing.get("default_model")
    if isinstance(default, str) and default not in ids:
        yield Mistake(("routing", "default_model"), f"{default!r} is not the id of a model of this file")


def _open_to_everybody(server: Mapping[str, Any], auth: Mapping[str, Any]) -> Iterator[Mistake]:
    host = server.get("host", LOOPBACK[0])
    if not isinstance(host, str) or host in LOOPBACK or server.get("insecure") is True:
        return
    if not (auth.get("keys") or auth.get("keys_file")):
        yield Mistake(
            ("server", "host"),
            f"{host!r} can be reached from outside and no API key is configured; "
            "add auth.keys, or say `insecure: true` (--insecure)",
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
