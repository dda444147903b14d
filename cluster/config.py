"""The configuration file: one YAML, checked to the last key. The only reader of YAML and of the environment.

Every mistake is reported with its line and key, all of them at once (`problems.py`, `references.py`). Knows the shape
of the configuration, not what is built from it (`app.py`). `${NAME}` inside a string is replaced by that environment
variable: for secrets and paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from cluster.problems import (
    HOLDS_ITSELF,
    ConfigError,
    Loc,
    Mistake,
    Problem,
    dotted,
    line_of,
    mistakes_of,
    problems_in,
    tree_mistakes,
)
from cluster.references import reference_mistakes
from replicas.engine.models.source import BUNDLED

BUNDLED_MODEL = "bundled:smollm2-135m"
BUNDLED_EMBEDDER = "bundled:all-minilm-l6-v2"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")]
Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ServerSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    dashboard_port: int = Field(8265, ge=1, le=65535)
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    insecure: bool = False
    """Listen beyond loopback although no API key is configured."""
    drain_timeout_s: float = Field(600.0, ge=0)
    """On a rolling update or scale-down a replica finishes its streams for at most this long."""


class GatewaySection(Section):
    num_replicas: int = Field(1, ge=1)
    max_concurrent_requests: int = Field(256, ge=1)
    max_queued_requests: int = Field(256, ge=0)
    """Beyond both, a request is answered 429 with Retry-After."""


class KeySection(Section):
    tenant: str = Field(min_length=1)
    sha256: Sha256Hex
    """`millrace hash-key` prints it; the key itself is never written down."""


class AuthSection(Section):
    keys: tuple[KeySection, ...] = Field((), strict=False)
    keys_file: str | None = None
    """A YAML list of the same form, for a mounted secret."""


class PriceSection(Section):
    """US dollars per million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)
    cached_prompt: float | None = Field(None, ge=0)
    """None: as `prompt`."""


class EngineSection(Section):
    """vLLM's flags by their names, underscores for dashes."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    quantization: str | None = None
    max_model_len: int | None = Field(None, ge=2)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(512, ge=1)
    max_queued_requests: int = Field(512, ge=1)
    block_size: int = Field(32, ge=1)
    num_gpu_blocks_override: int | None = Field(None, ge=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    enable_prefix_caching: bool = True
    num_threads: int | None = Field(None, ge=1)
    stream_interval_ms: float = Field(30.0, ge=0, le=1000)
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    kernels: str | None = None

    @field_validator("tensor_parallel_size", "pipeline_parallel_size")
    @classmethod
    def _one_rank(cls, value: int) -> int:
        if value != 1:
            raise ValueError("a replica runs on one device in this version; use num_replicas to spread over several")
        return value

    @field_validator("quantization")
    @classmethod
    def _dequantized_at_load(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("no quantized kernels in this version; GGUF files are dequantized when they are loaded")
        return value


class ModelSection(Section):
    id: ModelId
    source: str = Field(min_length=1)
    """A folder in Hugging Face format, a `.gguf` file, a hub id, or `bundled:NAME`."""
    aliases: tuple[ModelId, ...] = Field((), strict=False)
    num_replicas: int = Field(1, ge=1)
    num_gpus: float | None = Field(None, ge=0)
    """GPUs a replica reserves; None: one if the cluster has GPUs and `engine.device` allows it, else none."""
    price: PriceSection | None = None
    """None: unknown, which is never the cheapest."""
    quality: float = Field(0.5, ge=0, le=1)
    """Prior probability that this model answers an average request well."""
    fallbacks: tuple[ModelId, ...] = Field((), strict=False)
    """Tried in this order when no replica of the model can be reached."""
    engine: EngineSection = EngineSection()

    @field_validator("source")
    @classmethod
    def _known_if_bundled(cls, value: str) -> str:
        if value.startswith("bundled:") and value.removeprefix("bundled:") not in BUNDLED:
            known = ", ".join(f"bundled:{name}" for name in BUNDLED)
            raise ValueError(f"no model of that name is bundled; there is {known}")
        return value


class RoutingSection(Section):
    policy: Literal["fixed", "cheapest_capable"] = "cheapest_capable"
    default_model: ModelId | None = None
    """What `auto` means under `fixed`; None: the first model."""
    quality_target: float = Field(0.5, ge=0, le=1)


class CacheSection(Section):
    enabled: bool = True
    redis_url: str | None = None
    """Shared by all cache replicas; None: SQLite at `path`."""
    path: str | None = None
    """SQLite file; None: in `~/.cache/millrace`."""
    ttl_s: float = Field(24 * 3600.0, gt=0)
    max_entries: int = Field(100_000, ge=1)
    max_bytes: int = Field(512 * 2**20, ge=1024)
    similarity_threshold: float = Field(0.95, gt=0, le=1)
    cache_sampled: bool = False
    """Cache answers drawn at a temperature above 0 too."""
    embedder: str = BUNDLED_EMBEDDER

    @field_validator("redis_url")
    @classmethod
    def _names_a_redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(REDIS_SCHEMES):
            raise ValueError(f"must begin with {' or '.join(REDIS_SCHEMES)}")
        return value

    @field_validator("embedder")
    @classmethod
    def _known_if_bundled(cls, value: str) -> str:
        if value.startswith("bundled:") and value != BUNDLED_EMBEDDER:
            raise ValueError(f"no embedder of that name is bundled; there is {BUNDLED_EMBEDDER}")
        return value


class MillraceConfig(Section):
    server: ServerSection = ServerSection()
    gateway: GatewaySection = GatewaySection()
    auth: AuthSection = AuthSection()
    models: tuple[ModelSection, ...] = Field(min_length=1, strict=False)
    routing: RoutingSection = RoutingSection()
    cache: CacheSection = CacheSection()


class FromEnvironment(str):
    """Text in which `${NAME}` was replaced. Shown, it is what stands in the file: the environment may hold secrets."""

    __slots__ = ("_written",)
    _written: str

    def __new__(cls, value: str, written: str) -> FromEnvironment:
        text = super().__new__(cls, value)
        text._written = written
        return text

    def __repr__(self) -> str:
        return repr(self._written)


def load_config(path: Path, server: Mapping[str, Any] | None = None) -> MillraceConfig:
    """Read and check a file, in which `server` replaces keys of the section of that name, and its file of keys. Raises
    ConfigError with every mistake that was found."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem(0, "", f"cannot be read: {error}")]) from None
    return parse_config(text, str(path), server)


def parse_config(text: str, source: str = "configuration", server: Mapping[str, Any] | None = None) -> MillraceConfig:
    tree, data, mistakes = _read_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(
            source, problems_in(tree, [*mistakes, Mistake((), "must be a mapping with at least `models:`")])
        )
    data, unset = _expand_environment(data, os.environ)
    if server and isinstance(data.setdefault("server", {}), dict):
        data["server"].update(server)
    auth = data.get("auth")
    _, of_keys = _tenants(auth.get("keys"), auth.get("keys_file")) if isinstance(auth, dict) else ({}, [])
    config, found = _checked(data, unset, of_keys)
    mistakes += found
    if mistakes or config is None:
        raise ConfigError(source, problems_in(tree, mistakes))
    return config


def check_args(args: dict[str, Any]) -> MillraceConfig:
    """The `args:` of a Serve application, `${NAME}` and all, to a configuration. Raises ConfigError."""
    data, unset = _expand_environment(args, os.environ)
    return _unless_mistaken("args", *_checked(data, unset))


def check_config(data: dict[str, Any]) -> MillraceConfig:
    """A plain mapping, complete as it is, to a configuration. Raises ConfigError."""
    return _unless_mistaken("configuration", *_checked(data))


def read_keys(auth: AuthSection) -> dict[str, str]:
    """{SHA-256 of a key in hex: tenant} from the file and the section together. Raises ConfigError."""
    tenants, mistakes = _tenants(auth.keys, auth.keys_file)
    if mistakes:
        raise ConfigError("configuration", problems_in(None, mistakes))
    return tenants


def default_cache_path(cache: CacheSection) -> Path:
    if cache.path is not None:
        return Path(os.path.expanduser(cache.path))
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "millrace" / "cache.sqlite3"


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _read_yaml(text: str, source: str) -> tuple[yaml.Node | None, Any, list[Mistake]]:
    """The nodes, what they mean, and what is wrong with them. Raises ConfigError where they mean nothing."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        mistakes = tree_mistakes(tree)
        if any(m.message == HOLDS_ITSELF for m in mistakes):  # nobody could walk through what it means
            raise ConfigError(source, problems_in(tree, mistakes))
        return tree, yaml.safe_load(text), mistakes
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark else 0
    except ValueError:
        line, reason = 0, "it holds a date or a number that is none"
    except RecursionError:
        line, reason = 0, "it is nested too deeply"
    raise ConfigError(source, [Problem(line, "", f"not valid YAML: {reason}")])


def _checked(
    data: dict[str, Any], unset: Sequence[Mistake] = (), of_keys: Sequence[Mistake] = ()
) -> tuple[MillraceConfig | None, list[Mistake]]:
    """What can be made of `data`, and every mistake; of a value whose variable is `unset` only that."""
    config, found = None, [*reference_mistakes(data), *of_keys]
    try:
        config = MillraceConfig.model_validate(data)
    except ValidationError as error:
        found = mistakes_of(error, MillraceConfig) + found
    places = {mistake.loc for mistake in unset}
    return config, [*unset, *[mistake for mistake in found if mistake.loc not in places]]


def _unless_mistaken(source: str, config: MillraceConfig | None, mistakes: Sequence[Mistake]) -> MillraceConfig:
    if mistakes or config is None:
        raise ConfigError(source, problems_in(None, mistakes))
    return config


def _expand_environment(value: Any, environment: Mapping[str, str], loc: Loc = ()) -> tuple[Any, list[Mistake]]:
    if isinstance(value, str):
        names = _VARIABLE.findall(value)
        unset = [Mistake(loc, f"the environment variable {n} is not set") for n in names if n not in environment]
        expanded = _VARIABLE.sub(lambda m: environment.get(m[1], m[0]), value)
        return FromEnvironment(expanded, value) if names else value, unset
    if isinstance(value, dict):
        pairs = {k: _expand_environment(v, environment, (*loc, k)) for k, v in value.items()}
        return {k: v for k, (v, _) in pairs.items()}, [m for _, ms in pairs.values() for m in ms]
    if isinstance(value, list):
        items = [_expand_environment(v, environment, (*loc, i)) for i, v in enumerate(value)]
        return [v for v, _ in items], [m for _, ms in items for m in ms]
    return value, []


def _tenants(rows: Any, keys_file: Any) -> tuple[dict[str, str], list[Mistake]]:
    """{SHA-256 of a key: tenant} of what can be read, and every mistake that `AuthSection` does not know of.

    The messages name places, never what stands there."""
    at_file = ("auth", "keys_file")
    keys: list[tuple[Loc, str, KeySection]] = [
        (("auth", "keys", i), "", key) for i, row in enumerate(_rows(rows)) if (key := _valid_key(row)) is not None
    ]
    messages: list[str] = []
    if isinstance(keys_file, str) and keys_file:
        in_file, messages = _read_keys_file(Path(os.path.expanduser(keys_file)))
        keys += [(at_file, f"{row}: ", key) for row, key in in_file]
        if not keys and not messages:
            messages.append("the file holds no key")
    mistakes = [Mistake(at_file, message) for message in messages]
    tenants: dict[str, str] = {}
    for loc, row, key in keys:
        if tenants.setdefault(key.sha256, key.tenant) != key.tenant:
            mistakes.append(Mistake(loc, f"{row}one key for two tenants, it is another's already; give each its own"))
    return tenants, mistakes


def _read_keys_file(path: Path) -> tuple[list[tuple[str, KeySection]], list[str]]:
    """(row, key) of every row that is one, and what is wrong with the file or with its other rows."""
    try:
        text = path.read_text(encoding="utf-8")
        tree, rows = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        return [], [f"the file cannot be read: {error.strerror}"]
    except (yaml.YAMLError, ValueError, RecursionError):
        return [], ["the file is not valid YAML"]
    if not isinstance(rows, list | None):
        return [], ["the file must be a YAML list of `tenant` and `sha256`"]
    keys: list[tuple[str, KeySection]] = []
    messages: list[str] = []
    for i, content in enumerate(_rows(rows)):
        row = f"row {i + 1} (line {line_of(tree, (i,))} of the file)"
        try:
            keys.append((row, KeySection.model_validate(content)))
        except ValidationError as error:
            for mistake in mistakes_of(error, KeySection, ("auth",)):
                key = dotted(mistake.loc).removeprefix("auth").removeprefix(".")
                messages.append(": ".join(filter(None, (row, key, mistake.message))))
    return keys, messages


def _valid_key(row: Any) -> KeySection | None:
    try:
        return KeySection.model_validate(row)
    except ValidationError:
        return None


def _rows(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
