from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import AuthSection, load_config, parse_config, read_keys
from cluster.problems import ConfigError

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
        ("models:\n- id: a\n  source: x\n  fallbacks:\n    - b\n", 5, "models.0.fallbacks.0", "'b'"),
        ("models:\n- id: a\n  source: x\n  aliases:\n    - a\n", 5, "models.0.aliases.0", "taken"),
        (
            "models:\n- {id: a, source: x, num_gpus: 1, engine: {device: cpu}}\n",
            2,
            "models.0.num_gpus",
            "device is cpu",
        ),
        ("models:\n- {id: a, source: 'bundled:smolm'}\n", 2, "models.0.source", "there is bundled:smollm2-135m"),
        (MODEL + "cache: {embedder: 'bundled:bert'}\n", 2, "cache.embedder", "there is bundled:all-minilm-l6-v2"),
        (MODEL + "cache: {redis_url: 'http://h:1'}\n", 2, "cache.redis_url", "must begin with redis://"),
        (MODEL + "cache: {ttl_s: .inf}\n", 2, "cache.ttl_s", "finite"),
        (MODEL + "routing: {quality_target: .nan}\n", 2, "routing.quality_target", "finite"),
        (MODEL + "cache: {similarity_threshold: 0}\n", 2, "cache.similarity_threshold", "greater than 0"),
        (MODEL + "cache: 3\n", 2, "cache", "should be a mapping"),
        ("models: 3\n", 1, "models", "a list"),
        ("models: &m [*m]\n", 1, "models.0", "part of"),
        ("models: [x]\nserver: &s\n  <<: *s\n", 3, "server.<<", "part of"),
        ("a: 2024-99-99\n", 0, "", "not valid YAML"),
        ("[" * 5000, 0, "", "nested too deeply"),
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


def mistaken(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return caught.value


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("- {tenant: a}\n")
    found = mistaken(f"""\
server: {{port: x, hots: y, host: 0.0.0.0}}
auth: {{keys_file: {file}}}
models:
- {{id: a, source: 3, aliases: [a, auto], fallbacks: [z, y]}}
- {{id: a, source: x, num_gpus: 2, engine: {{device: cpu, block_size: 0}}}}
routing: {{default_model: w}}
cache: {{redis_url: '${{NOT_SET_ANYWHERE}}'}}
""")
    assert [problem.key for problem in found.problems] == [
        "server.port",
        "server.hots",
        "auth.keys_file",
        "models.0.source",
        "models.0.aliases.0",
        "models.0.aliases.1",
        "models.0.fallbacks.0",
        "models.0.fallbacks.1",
        "models.1.engine.block_size",
        "models.1.id",
        "models.1.num_gpus",
        "routing.default_model",
        "cache.redis_url",
    ]
    assert [problem.line for problem in found.problems] == [1, 1, 2, 4, 4, 4, 4, 4, 5, 5, 5, 6, 7]
    without_keys = mistaken("server: {port: x, host: 0.0.0.0}\nmodels: []\n")
    assert [problem.key for problem in without_keys.problems] == ["server.port", "server.host", "models"]


@pytest.mark.parametrize(
    "text",
    [
        "auth: {keys: [{tenant: a, sha256: SECRET}]}",
        "auth: {keys: [{tenant: [SECRET], sha256: 1}]}",
        "auth: {keys: [{SECRET: a}]}",
        "auth: {keys: [{SECRET: a, SECRET: b}]}",
        "auth: {keys: [SECRET]}",
        "auth: {keys: SECRET}",
        "auth: SECRET",
        "auth: {SECRET: 1}",
        f"auth: {{keys: [{{tenant: SECRET, sha256: {'a' * 64}}}, {{tenant: b, sha256: {'a' * 64}}}]}}",
        "cache: {redis_url: 'http://:SECRET@h'}",
        "cache: {redis_url: [SECRET]}",
        "cache: {redis_url: 'SECRET'}",
        "cache: SECRET",
        "server: {port: '${MY_SECRET}'}",
        "server: {host: '${MY_SECRET}'}",
        "routing: {default_model: '${MY_SECRET}', policy: '${MY_SECRET}'}",
        "cache: {redis_url: '${MY_SECRET}'}",
        "cache: {ttl_s: 'x${MY_SECRET}'}",
        "auth: {keys_file: '/${MY_SECRET}'}",
        "models: [{id: '${MY_SECRET}', source: x}, {id: '${MY_SECRET}', source: 'bundled:${MY_SECRET}'}]",
        "models: [{id: a, source: x, fallbacks: ['${MY_SECRET}'], aliases: ['${MY_SECRET}', '${MY_SECRET}']}]",
    ],
)
def test_no_mistake_shows_a_secret(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "SECRET")
    found = mistaken(text + "\n" + ("" if text.startswith("models") else MODEL))
    assert "SECRET" not in str(found).replace("${MY_SECRET}", "")


def test_what_the_environment_replaced_is_shown_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8000")
    assert "got '${PORT}'" in str(mistaken(MODEL + "server: {port: '${PORT}'}"))


def test_a_variable_that_is_not_set_is_its_values_only_mistake() -> None:
    found = mistaken(MODEL + "auth: {keys_file: '${NOT_SET}'}\ncache: {redis_url: '${NOT_SET}'}\n")
    assert [problem.key for problem in found.problems] == ["auth.keys_file", "cache.redis_url"]


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


GOOD_ROW = "- {tenant: a, sha256: " + "a" * 64 + "}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no key"),
        ("x", "must be a YAML list"),
        ("{", "not valid YAML"),
        ("- {tenant: a}", "row 1 (line 1 of the file): sha256: is required"),
        (GOOD_ROW + "\n- 3", "row 2 (line 3 of the file): should be a mapping"),
        (GOOD_ROW + "- {tenant: b, sha256: sk-live}\n", "row 2 (line 2 of the file): sha256: string should match"),
        (GOOD_ROW + "- {tenant: b, sk-live: 1}\n", "row 2 (line 2 of the file): …: unknown key"),
        (GOOD_ROW + GOOD_ROW.replace("tenant: a", "tenant: b"), "row 2 (line 2 of the file): one key for two tenants"),
    ],
)
def test_a_broken_keys_file_is_refused_without_showing_it(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    found = mistaken(MODEL + f"auth:\n  keys_file: {file}\n")
    assert {(problem.line, problem.key) for problem in found.problems} == {(3, "auth.keys_file")}
    assert says in str(found)
    assert "sk-live" not in str(found)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_keys(AuthSection(keys_file=str(file)))


def test_a_keys_file_that_is_not_there() -> None:
    found = mistaken(MODEL + "auth: {keys_file: /none}\n")
    assert str(found) == "configuration: line 2: auth.keys_file: the file cannot be read: No such file or directory"


def test_one_key_of_two_tenants_is_refused() -> None:
    keys = "auth:\n  keys:\n  - {tenant: a, sha256: " + "a" * 64 + "}\n  - {tenant: b, sha256: " + "a" * 64 + "}\n"
    (problem,) = mistaken(MODEL + keys).problems
    assert (problem.line, problem.key) == (5, "auth.keys.1")
    assert "two tenants" in problem.message
