"""A conversation with a running endpoint in the terminal. Knows the wire format of chat completions only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class ChatError(Exception):
    """The endpoint did not answer; the message says why, in its own words where it gave any."""


def chat(console: Console, url: str, model: str, api_key: str | None, system: str | None) -> None:
    """Read questions until the end of input, answer each as it streams in. Raises ChatError if nobody is there."""
    client = _client(url, api_key)
    _check(client, model)
    first: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    console.print(f"{url} · {model} · {HELP}", style="dim", markup=False, highlight=False)
    while (question := _ask(console)) is not None:
        if question == "/reset":
            messages = list(first)
        elif question:
            messages.append({"role": "user", "content": question})
            answer = _print_answer(console, client, model, messages)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()


def _client(url: str, api_key: str | None) -> httpx.Client:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ChatError(f"--url {url} is not an address ({error}); name one like http://127.0.0.1:8000") from None
    if address.scheme not in ("http", "https") or not address.host or not 0 < (address.port or 80) < 2**16:
        raise ChatError(f"--url {url} is not the address of an endpoint; name one like http://127.0.0.1:8000")
    return httpx.Client(base_url=url, timeout=httpx.Timeout(None, connect=5.0), headers=_headers(api_key))


def _check(client: httpx.Client, model: str) -> None:
    try:
        response = client.get(f"/v1/models/{model}", timeout=10.0)
    except httpx.HTTPError as error:
        raise _nobody(client, error) from None
    if response.status_code != 200:
        raise ChatError(_error_message(response))


def _ask(console: Console) -> str | None:
    try:
        question = console.input("[bold cyan]> [/bold cyan]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if question == "/exit" else question


def _print_answer(console: Console, client: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    answer = ""
    try:
        for text in _stream(client, model, messages):
            answer += text
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except ChatError as error:
        console.print(str(error), style="red", end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer


def _stream(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
    body = {"model": model, "messages": messages, "stream": True}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_error_message(response))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event: dict[str, Any] = json.loads(line[6:])
                    if "error" in event:
                        raise ChatError(event["error"]["message"])
                    for choice in event.get("choices", ()):
                        yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise _nobody(client, error) from None


def _nobody(client: httpx.Client, error: httpx.HTTPError) -> ChatError:
    return ChatError(f"no answer from {client.base_url}: {error}; is `millrace serve` running?")


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
