"""`millrace`: serve, validate, chat, hash-key. Parses, prints and exits; the work is done in the modules it calls."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.chat import ChatError, chat
from cluster.config import BUNDLED_MODEL, MillraceConfig, check_config, load_config
from cluster.local import Interrupted, LocalCluster, StartError, logs_directory
from cluster.problems import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def main() -> None:
    app()


def _flag(help: str, **options: Any) -> Any:
    return typer.Option(help=help, show_default=False, **options)


@app.command()
def serve(
    target: Annotated[
        str,
        typer.Argument(metavar="[CONFIG.yaml | MODEL]", help="A configuration, or a hub id, a folder or a .gguf file."),
    ] = BUNDLED_MODEL,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the endpoint.", show_default="8000")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the Ray dashboard.", show_default="8265")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without API keys.")] = False,
    api_key: Annotated[
        list[str] | None,
        _flag("Clients must send one of these keys (may be repeated)."),
    ] = None,
    served_model_name: Annotated[str | None, _flag("The id that requests name.")] = None,
    num_replicas: Annotated[int | None, _flag("Copies of the model.")] = None,
    dtype: Annotated[str | None, _flag("auto, bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, _flag("auto, cpu, cuda or cuda:N.")] = None,
    max_model_len: Annotated[int | None, _flag("Context in tokens.")] = None,
    max_num_seqs: Annotated[int | None, _flag("Requests in one step at most.")] = None,
    max_num_batched_tokens: Annotated[int | None, _flag("Tokens in one step at most.")] = None,
    stream_interval_ms: Annotated[float | None, _flag("Tokens wait about this long to travel together.")] = None,
    block_size: Annotated[int | None, _flag("Tokens in one KV block.")] = None,
    gpu_memory_utilization: Annotated[float | None, _flag("Share of GPU memory.")] = None,
    kv_cache_memory_bytes: Annotated[int | None, _flag("Size of the KV cache.")] = None,
    num_gpu_blocks_override: Annotated[int | None, _flag("Number of KV blocks.")] = None,
    enable_prefix_caching: Annotated[bool | None, _flag("Share KV of equal prefixes.")] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", "-q", hidden=True)] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option("--tensor-parallel-size", "-tp", hidden=True)] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option("--pipeline-parallel-size", "-pp", hidden=True)] = None,
    redis_url: Annotated[str | None, _flag("Keep the semantic cache in this Redis.")] = None,
    cache: Annotated[
        bool | None, typer.Option(help="Answer repeated questions from the semantic cache.", show_default="cache")
    ] = None,
) -> None:
    """Serve a model, or all models of a configuration, on this machine behind one OpenAI endpoint.

    Without an argument the bundled SmolLM2-135M-Instruct is served. Ctrl-C stops everything.
    """
    engine = {
        "dtype": dtype,
        "device": device,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "stream_interval_ms": stream_interval_ms,
        "block_size": block_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "num_gpu_blocks_override": num_gpu_blocks_override,
        "enable_prefix_caching": enable_prefix_caching,
        "quantization": quantization,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
    }
    server = {"host": host, "port": port, "dashboard_port": dashboard_port, "insecure": insecure or None}
    model = {"id": served_model_name, "num_replicas": num_replicas}
    cache_section = {"enabled": cache, "redis_url": redis_url}
    with _errors_as_sentences():
        if Path(target).suffix in (".yaml", ".yml"):
            _refuse_flags({**model, **engine, **cache_section, "api_key": api_key})
            config = load_config(Path(target), _given(server))
        else:
            keys = [{"tenant": f"key-{i}", "sha256": sha256_hex(key)} for i, key in enumerate(api_key or (), 1)]
            model = {"source": target, **model, "id": served_model_name or default_model_id(target)}
            config = _config_of_flags(server, model, engine, cache_section, keys)
        run(config)


@app.command()
def validate(config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]) -> None:
    """Check a configuration and name the line and key of every mistake."""
    with _errors_as_sentences():
        checked = load_config(config)
    models = ", ".join(f"{m.id} × {m.num_replicas}" for m in checked.models)
    out.print(f"{config}: valid; {models}", soft_wrap=True)


@app.command(name="chat")
def chat_command(
    url: Annotated[str, typer.Option(help="A running endpoint.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="A model's id, or auto.")] = "auto",
    api_key: Annotated[str | None, _flag("Key to send.", envvar="MILLRACE_API_KEY")] = None,
    system: Annotated[str | None, _flag("System prompt.")] = None,
) -> None:
    """Talk to a running endpoint."""
    with _errors_as_sentences():
        chat(out, url.rstrip("/").removesuffix("/v1"), model, api_key, system)


@app.command(name="hash-key")
def hash_key(
    tenant: Annotated[str, typer.Option(help="Whom the key admits.")] = "default",
    generate: Annotated[bool, typer.Option("--generate", help="Make a new key and show it, once.")] = False,
) -> None:
    """Print the line of `auth.keys` for an API key read from standard input."""
    if generate:
        key = f"mr-{secrets.token_urlsafe(32)}"
        err.print(f"key (not stored anywhere): {key}", soft_wrap=True)
    else:
        key = typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    if not key:
        err.print("[red]error:[/red] the key is empty")
        raise typer.Exit(2)
    typer.echo(f"- {{tenant: {json.dumps(tenant)}, sha256: {sha256_hex(key)}}}")


def run(config: MillraceConfig) -> None:
    """Start, say so, wait for Ctrl-C or SIGTERM, stop. Raises StartError."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    started = time.perf_counter()
    with _progress() as on_phase, LocalCluster(config, stop, on_phase) as cluster:
        try:
            cluster.start()
        except Interrupted:
            on_phase("stopping")
            return
        on_phase(None)
        _print_welcome(cluster, time.perf_counter() - started)
        stop.wait()
        out.print("\nstopping …")
    out.print("stopped")


def default_model_id(source: str) -> str:
    """`bundled:NAME` and `org/NAME` are called NAME, a file or folder by its own name, in lower case."""
    name = source.removeprefix("bundled:")
    if name == source:
        name = Path(os.path.expanduser(source)).resolve().name
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.removesuffix(".gguf"))
    return name.lower().lstrip("._-")[:128] or "model"


def sha256_hex(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _config_of_flags(
    server: dict[str, Any],
    model: dict[str, Any],
    engine: dict[str, Any],
    cache: dict[str, Any],
    keys: list[dict[str, str]],
) -> MillraceConfig:
    data = {
        "server": _given(server),
        "auth": {"keys": keys},
        "models": [{**_given(model), "engine": _given(engine)}],
        "cache": _given(cache),
    }
    try:
        return check_config(data)
    except ConfigError as error:
        for problem in error.problems:
            flag = _flag_name(problem.key.rsplit(".", 1)[-1])
            err.print(f"error: {flag}: {problem.message}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _refuse_flags(flags: dict[str, Any]) -> None:
    if given := sorted(_given(flags)):
        raise StartError(f"with a configuration file, set these in the file: {', '.join(map(_flag_name, given))}")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _flag_name(key: str) -> str:
    """Of the last part of a configuration key."""
    names = {"id": "--served-model-name", "source": "MODEL", "enabled": "--cache/--no-cache"}
    return names.get(key, "--" + key.replace("_", "-"))


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        err.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (StartError, ChatError) as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Yields a function that shows the phase it is told; None ends the display."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def on_phase(name: str | None) -> None:
            for task in progress.task_ids:
                progress.update(task, visible=False)
                progress.stop_task(task)
            if name is None:
                progress.stop()
                return
            verb = name if name == "stopping" else f"starting {name}"
            progress.add_task(verb)
            if not err.is_terminal:
                err.print(f"{verb} …")

        yield on_phase


def _print_welcome(cluster: LocalCluster, seconds: float) -> None:
    config = cluster.config
    model = config.models[0].id if len(config.models) == 1 else "auto"
    question = {"role": "user", "content": "Why is the sky blue?"}
    body = json.dumps({"model": model, "messages": [question], "max_tokens": 100})
    key = ' -H "Authorization: Bearer $MILLRACE_API_KEY"' if config.auth.keys or config.auth.keys_file else ""
    phases = ", ".join(f"{name} {s:.1f} s" for name, s in cluster.phases_s.items())
    token = f"   token {cluster.ray_token}" if cluster.ray_token else ""
    kernels = ", ".join(sorted({name for names in cluster.kernels.values() for name in names}))
    if cluster.why_no_kernels:
        kernels += f": plain torch, several times slower, because {cluster.why_no_kernels}"
    lines = (
        f"Millrace is ready after {seconds:.1f} s ({phases})",
        "",
        f"  endpoint   {cluster.url}/v1   (OpenAPI at {cluster.url}/docs)",
        f"  models     {', '.join(m.id for m in config.models)}, auto",
        f"  kernels    {kernels}",
        f"  dashboard  {cluster.dashboard_url}{token}",
        f"  logs       {logs_directory()}",
        "",
        f"curl -s {cluster.url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'",
        "",
        "Ctrl-C stops everything.",
    )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
