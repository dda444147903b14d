"""The configuration file: one YAML, checked to the last key. The only reader of YAML and of the environment.

Every mistake is reported with its line and key, all of them at once. Knows the shape of the configuration, not what
is built from it (`app.py`). `${NAME}` inside a string is replaced by that environment variable: for secrets and paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BUNDLED_MODEL = "bundled:smollm2-135m"
BUNDLED_EMBEDDER = "bundled:all-minilm-l6-v2"

ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")]
Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    max_num_batched_tokens: int = Field(1024, ge=1)
    max_queued_requests: int = Field(512, ge=1)
    block_size: int = Field(32, ge=1)
    num_gpu_blocks_override: int | None = Field(None, ge=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    enable_prefix_caching: bool = True
    num_threads: int | None = Field(None, ge=1)
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
    similarity_threshold: float = Field(0.95, ge=0, le=1)
    cache_sampled: bool = False
    """Cache answers drawn at a temperature above 0 too."""
    embedder: str = BUNDLED_EMBEDDER


class MillraceConfig(Section):
    server: ServerSection = ServerSection()
    gateway: GatewaySection = GatewaySection()
    auth: AuthSection = AuthSection()
    models: tuple[ModelSection, ...] = Field(min_length=1, strict=False)
    routing: RoutingSection = RoutingSection()
    cache: CacheSection = CacheSection()

    @model_validator(mode="after")
    def _references_hold(self) -> MillraceConfig:
        names: set[str] = {"auto"}
        for i, model in enumerate(self.models):
            for name in (model.id, *model.aliases):
                if name in names:
                    raise located(("models", i, "id"), f"the name {name!r} is taken; every id and alias must differ")
                names.add(name)
        ids = {m.id for m in self.models}
        for i, model in enumerate(self.models):
            for fallback in model.fallbacks:
                if fallback not in ids or fallback == model.id:
                    raise located(("models", i, "fallbacks"), f"{fallback!r} is not the id of another model")
        if self.routing.default_model is not None and self.routing.default_model not in ids:
            raise located(("routing", "default_model"), f"{self.routing.default_model!r} is not a model of this file")
        if (
            not self.server.insecure
            and self.server.host not in LOOPBACK
            and not (self.auth.keys or self.auth.keys_file)
        ):
            raise located(
                ("server", "host"),
                f"{self.server.host} can be reached from outside and no API key is configured; "
                "add auth.keys, or say `insecure: true` (--insecure)",
            )
        return self


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


def load_config(path: Path, server: Mapping[str, Any] | None = None) -> MillraceConfig:
    """Read and check a file, in which `server` replaces keys of the section of that name. Raises ConfigError with every
    mistake that was found."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem(0, "", f"cannot be read: {error}")]) from None
    return parse_config(text, str(path), server)


def parse_config(text: str, source: str = "configuration", server: Mapping[str, Any] | None = None) -> MillraceConfig:
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(source, [Problem(mark.line + 1 if mark else 0, "", f"not valid YAML: {reason}")]) from None
    found = _duplicate_keys(tree)
    if not isinstance(data, dict):
        raise ConfigError(source, [Problem(1, "", "must be a mapping with at least `models:`")])
    data, missing = _expand_environment(data, dict(os.environ))
    found += [Problem(_line(tree, loc), _dotted(loc), message) for loc, message in missing]
    if server and isinstance(data.setdefault("server", {}), dict):
        data["server"].update(server)
    try:
        config = check_config(data)
    except ValidationError as error:
        found += problems(tree, error)
        config = None
    if found or config is None:
        raise ConfigError(source, sorted(found, key=lambda p: p.line))
    return config


def check_args(args: dict[str, Any]) -> MillraceConfig:
    """The `args:` of a Serve application, `${NAME}` and all, to a configuration. Raises ConfigError."""
    data, missing = _expand_environment(args, dict(os.environ))
    found = [Problem(0, _dotted(loc), message) for loc, message in missing]
    try:
        config = check_config(data)
    except ValidationError as error:
        raise ConfigError("args", found + problems(None, error)) from None
    if found:
        raise ConfigError("args", found)
    return config


def check_config(data: dict[str, Any]) -> MillraceConfig:
    """A plain mapping, complete as it is, to a configuration. Raises pydantic's ValidationError."""
    return MillraceConfig.model_validate(data)


def read_keys(auth: AuthSection) -> dict[str, str]:
    """{SHA-256 of a key in hex: tenant} from the file and the section together. Raises ConfigError."""
    keys = list(auth.keys)
    if auth.keys_file:
        path = Path(os.path.expanduser(auth.keys_file))
        try:
            rows = yaml.safe_load(path.read_text(encoding="utf-8"))
            keys += [KeySection.model_validate(row) for row in rows or ()]
        except (OSError, yaml.YAMLError, TypeError, ValidationError):
            problem = Problem(0, "auth.keys_file", f"{path} must be a YAML list of `tenant` and `sha256`")
            raise ConfigError("configuration", [problem]) from None
        if not keys:
            raise ConfigError("configuration", [Problem(0, "auth.keys_file", f"{path} holds no key")])
    tenants: dict[str, str] = {}
    for key in keys:
        if tenants.setdefault(key.sha256, key.tenant) != key.tenant:
            message = f"one key for two tenants, {tenants[key.sha256]!r} and {key.tenant!r}; give each its own"
            raise ConfigError("configuration", [Problem(0, "auth.keys", message)])
    return tenants


def default_cache_path(cache: CacheSection) -> Path:
    if cache.path is not None:
        return Path(os.path.expanduser(cache.path))
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "millrace" / "cache.sqlite3"


_PLACE = re.compile(r"^\[at ([^\]]*)\] ")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_Loc = tuple[int | str, ...]


def located(loc: _Loc, message: str) -> ValueError:
    """An error of a whole-file check that still knows its place."""
    return ValueError(f"[at {_dotted(loc)}] {message}")


def problems(tree: yaml.Node | None, error: ValidationError) -> list[Problem]:
    """Every mistake with its key, and with its line where `tree` is the YAML that was checked."""
    errors = error.errors()
    # An invalid item also makes its list look too short; the item's own mistake is the one to report.
    places = {tuple(e["loc"]) for e in errors}
    return [
        _problem(tree, e)
        for e in errors
        if not (e["type"] == "too_short" and any(p[: len(e["loc"])] == e["loc"] and p != e["loc"] for p in places))
    ]


def _problem(tree: yaml.Node | None, error: Any) -> Problem:
    loc: _Loc = tuple(error["loc"])
    message: str = error["msg"].removeprefix("Value error, ")
    if place := _PLACE.match(message):
        loc = tuple(int(p) if p.isdigit() else p for p in place[1].split("."))
        message = message[place.end() :]
    if error["type"] == "extra_forbidden":
        message = "unknown key" + _suggestion(loc)
    elif error["type"] == "missing":
        message = "is required"
    else:
        message = message[0].lower() + message[1:]
        if error["type"] != "value_error" and not isinstance(error.get("input"), dict | list | tuple):
            message += f", got {error['input']!r}"
    return Problem(_line(tree, loc), _dotted(loc), message)


def _suggestion(loc: _Loc) -> str:
    import difflib

    section: Any = MillraceConfig
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


def _line(tree: yaml.Node | None, loc: _Loc) -> int:
    """The line of the deepest part of `loc` that stands in the file."""
    node, line = tree, (tree.start_mark.line + 1 if tree else 0)
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _dotted(loc: _Loc) -> str:
    return ".".join(map(str, loc))


def _duplicate_keys(node: yaml.Node | None, path: _Loc = ()) -> list[Problem]:
    problems: list[Problem] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            here = (*path, key.value)
            if key.value in seen:
                problems.append(Problem(key.start_mark.line + 1, _dotted(here), "stands twice"))
            seen.add(key.value)
            problems += _duplicate_keys(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            problems += _duplicate_keys(value, (*path, i))
    return problems


def _expand_environment(value: Any, environment: dict[str, str], loc: _Loc = ()) -> tuple[Any, list[tuple[_Loc, str]]]:
    if isinstance(value, str):
        unset = [name for name in _VARIABLE.findall(value) if name not in environment]
        missing = [(loc, f"the environment variable {name} is not set") for name in unset]
        return _VARIABLE.sub(lambda m: environment.get(m[1], m[0]), value), missing
    if isinstance(value, dict):
        pairs = {k: _expand_environment(v, environment, (*loc, k)) for k, v in value.items()}
        return {k: v for k, (v, _) in pairs.items()}, [m for _, ms in pairs.values() for m in ms]
    if isinstance(value, list):
        items = [_expand_environment(v, environment, (*loc, i)) for i, v in enumerate(value)]
        return [v for v, _ in items], [m for _, ms in items for m in ms]
    return value, []
