from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigError, load_config, parse_config, read_keys

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.yaml"))
MODEL = "models: [{id: a, source: x}]\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_valid(path: Path) -> None:
    assert load_config(path).models


@pytest.mark.parametrize(
    ("text", "line", "key", "says"),
    [
        ("models:\n  - id: a\n    sorce: x\n", 3, "models.0.sorce", "did you mean `source`"),
        ("models:\n  - id: a\n    sorce: x\n", 2, "models.0.source", "required"),
        (MODEL + "server:\n  port: '80'\n", 3, "server.port", "integer"),
        (MODEL + "server:\n  host: 0.0.0.0\n", 3, "server.host", "API key"),
        (MODEL + "cache:\n  ttl_s: -1\n", 3, "cache.ttl_s", "greater than 0"),
        (MODEL + "cache: {}\ncache: {}\n", 3, "cache", "twice"),
        (MODEL + "cache:\n  redis_url: ${NOT_SET_ANYWHERE}\n", 3, "cache.redis_url", "NOT_SET_ANYWHERE"),
        ("models:\n- {id: a, source: x}\n- {id: a, source: y}\n", 3, "models.1.id", "taken"),
        ("models:\n- {id: a, source: x, fallbacks: [b]}\n", 2, "models.0.fallbacks", "'b'"),
        (MODEL + "routing: {default_model: z}\n", 2, "routing.default_model", "'z'"),
        (
            "models:\n- {id: a, source: x, engine: {tensor_parallel_size: 2}}\n",
            2,
            "models.0.engine.tensor_parallel_size",
            "one device",
        ),
        ("models: [\n", 2, "", "not valid YAML"),
        ("- a\n", 1, "", "mapping"),
        ("models: []\n", 1, "models", "at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(text: str, line: int, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert [p for p in caught.value.problems if (p.line, p.key) == (line, key) and says in p.message], caught.value


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("server: {port: x, hots: y}\nmodels: [{id: a, source: 3}]\n")
    assert len(caught.value.problems) == 3


@given(st.text(max_size=200))
def test_no_text_whatever_gives_another_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(text)


def test_environment_is_read_inside_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_REDIS", "redis://h:1/0")
    assert parse_config(MODEL + "cache: {redis_url: '${MY_REDIS}'}").cache.redis_url == "redis://h:1/0"


def test_keys_come_from_section_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{tenant: b, sha256: {'B' * 64}}}\n")
    config = parse_config(MODEL + f"auth:\n  keys: [{{tenant: a, sha256: {'a' * 64}}}]\n  keys_file: {file}\n")
    assert read_keys(config.auth) == {"a" * 64: "a", "b" * 64: "b"}


@pytest.mark.parametrize("content", ["", "x", "- {tenant: a}", "- 3", "{"])
def test_a_broken_keys_file_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    config = parse_config(MODEL + f"auth: {{keys_file: {file}}}\n")
    with pytest.raises(ConfigError, match=r"auth\.keys_file"):
        read_keys(config.auth)


def test_one_key_of_two_tenants_is_refused() -> None:
    keys = "auth: {keys: [{tenant: a, sha256: " + "a" * 64 + "}, {tenant: b, sha256: " + "a" * 64 + "}]}\n"
    with pytest.raises(ConfigError, match="two tenants"):
        read_keys(parse_config(MODEL + keys).auth)
