"""What the command line makes of its flags, and what it says where they make no sense."""

from __future__ import annotations

import hashlib
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from typer.testing import CliRunner

from cluster import cli
from cluster.config import MillraceConfig, ModelId
from cluster.local import StartError, check_machine, check_port

MODEL = "models: [{id: a, source: x}]\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[MillraceConfig]:
    """The configurations that would have been started."""
    configs: list[MillraceConfig] = []
    monkeypatch.setattr(cli, "run", configs.append)
    return configs


def millrace(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stderr


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(MODEL + "server: {host: 0.0.0.0, port: 9000}\n")
    return str(path)


def test_flags_of_a_model_become_its_configuration(started: list[MillraceConfig]) -> None:
    code, _ = millrace("serve", "org/Some-Model", "--max-model-len", "512", "--api-key", "k", "--no-cache")
    assert code == 0
    (config,) = started
    (model,) = config.models
    assert (model.id, model.source, model.engine.max_model_len) == ("some-model", "org/Some-Model", 512)
    assert [key.sha256 for key in config.auth.keys] == [hashlib.sha256(b"k").hexdigest()]
    assert not config.cache.enabled


def test_server_flags_go_before_the_file(started: list[MillraceConfig], config_file: str) -> None:
    code, stderr = millrace("serve", config_file)
    assert code == 2
    assert "0.0.0.0" in stderr
    assert "--insecure" in stderr
    assert started == []
    assert millrace("serve", config_file, "--insecure", "--port", "9001")[0] == 0
    assert millrace("serve", config_file, "--host", "127.0.0.1")[0] == 0
    assert [(c.server.host, c.server.port) for c in started] == [("0.0.0.0", 9001), ("127.0.0.1", 9000)]


def test_validate_names_every_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(MODEL + "server: {host: 0.0.0.0, port: x}\nauth: {keys_file: /none}\n")
    code, stderr = millrace("validate", str(path))
    assert code == 2
    assert [line.split(": ")[1:3] for line in stderr.splitlines()] == [
        ["line 2", "server.port"],
        ["line 3", "auth.keys_file"],
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--api-key", "secret"], "--api-key"),
        (["--no-cache"], "--cache/--no-cache"),
        (["--dtype", "float32"], "--dtype"),
        (["--served-model-name", "b"], "--served-model-name"),
    ],
)
def test_no_flag_is_dropped_beside_a_file(
    started: list[MillraceConfig], config_file: str, flags: list[str], named: str
) -> None:
    code, stderr = millrace("serve", config_file, "--insecure", *flags)
    assert code == 1
    assert named in stderr
    assert "secret" not in stderr
    assert started == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-model-len", "1"], r"^error: --max-model-len: .*2, got 1$"),
        (["--served-model-name", "a b"], r"^error: --served-model-name: "),
        (["-tp", "2"], r"^error: --tensor-parallel-size: a replica runs on one device"),
        (["--host", "0.0.0.0"], r"^error: --host: .*API key"),
    ],
)
def test_a_wrong_flag_is_named(started: list[MillraceConfig], arguments: list[str], says: str) -> None:
    code, stderr = millrace("serve", *arguments)
    assert code == 2
    assert re.match(says, stderr)
    assert len(stderr.splitlines()) == 1
    assert started == []


@given(st.text(min_size=1).filter(lambda source: "\0" not in source))
def test_every_source_has_a_valid_id(source: str) -> None:
    TypeAdapter(ModelId).validate_python(cli.default_model_id(source))


def test_a_folder_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.default_model_id(".") == cli.default_model_id(str(tmp_path))
    assert cli.default_model_id("bundled:smollm2-135m") == "smollm2-135m"
    assert cli.default_model_id("/models/My Model.gguf") == "my-model"


def test_chat_with_nobody_there_fails() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # taken, and nobody listens
        code, stderr = millrace("chat", "--url", f"http://127.0.0.1:{s.getsockname()[1]}")
    assert code == 1
    assert "millrace serve" in stderr


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:abc",
        "http://localhost:99999",
        "localhost:8000",
        "ftp://localhost",
        "http:",
        "",
        "http://\x00",
    ],
)
def test_chat_with_no_address_says_so(url: str) -> None:
    code, stderr = millrace("chat", "--url", url)
    assert code == 1
    assert stderr.startswith(f"error: --url {url} is not ")
    assert stderr.endswith("name one like http://127.0.0.1:8000\n")


def test_ports_that_cannot_be_listened_on() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(StartError, match=r"in use; choose another with --port"):
            check_port("--port", "127.0.0.1", s.getsockname()[1])
    with pytest.raises(StartError, match="name an address of this machine"):
        check_port("--port", "192.0.2.1", 8000)  # RFC 5737: nobody's
    config = MillraceConfig.model_validate(
        {"models": [{"id": "a", "source": "x"}], "server": {"port": 8265, "dashboard_port": 8265}}
    )
    with pytest.raises(StartError, match="two different ports"):
        check_machine(config)


def test_generated_keys_match_their_digest() -> None:
    result = CliRunner().invoke(cli.app, ["hash-key", "--tenant", "ann", "--generate"])
    key = re.search(r"mr-\S+", result.stderr)
    assert key is not None
    assert result.stdout == f'- {{tenant: "ann", sha256: {hashlib.sha256(key[0].encode()).hexdigest()}}}\n'
