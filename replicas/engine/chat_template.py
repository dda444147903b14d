"""Messages to prompt text by the model's own Jinja template, in the same sandbox and with the same helpers as
`transformers.apply_chat_template`, without importing transformers. Knows no tokens.

A template comes with a model, so it is sandboxed; messages, tools and arguments come from a client, so whatever goes
wrong with them is an `InvalidRequest` on that field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from replicas.types import ChatPrompt, InvalidRequest

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_PROBE = "content-probe"
_MAX_DEPTH = 100
"""Far beyond any schema of a tool, and far from the recursion limit of Python and of the templates' filters."""


class ChatTemplate:
    """`sources` by name: `default`, and `tool_use` for requests with tools where the model has one. `special_tokens`
    (`bos_token`, `eos_token` ...) are variables of the template. The source is compiled on first use."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, tuple[jinja2.Template, bool]] = {}

    def render(self, prompt: ChatPrompt) -> str:
        """The prompt's text. Raises InvalidRequest, `param` "messages", "tools" or "chat_template_kwargs"."""
        for name in prompt.template_kwargs:
            if name in _RESERVED:
                raise InvalidRequest(f"{name} is set by the request and cannot be overridden", "chat_template_kwargs")
        template, takes_parts = self._template(with_tools=bool(prompt.tools))
        if not prompt.messages:
            raise InvalidRequest("messages is empty, expected at least one message", "messages")
        messages = [_plain_message(i, message, takes_parts) for i, message in enumerate(prompt.messages)]
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": [_plain(tool, "tools") for tool in prompt.tools] or None,
            "add_generation_prompt": prompt.add_generation_prompt,
        }
        arguments = _plain(prompt.template_kwargs, "chat_template_kwargs")
        try:
            return template.render({**variables, **arguments})
        except Exception as error:  # a template can fail in any way on messages it does not expect
            blamed, param = "messages", "messages"
            if arguments and _renders(template, variables):
                blamed, param = "arguments", "chat_template_kwargs"
            raise InvalidRequest(f"the model's chat template refuses these {blamed}: {error}", param) from error

    def _template(self, with_tools: bool) -> tuple[jinja2.Template, bool]:
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._compiled:
            source = self._sources.get(name)
            if source is None:
                known = ", ".join(sorted(self._sources))
                raise InvalidRequest(f"the model has no default chat template, only: {known}", "messages")
            try:
                template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                raise InvalidRequest(f"the model's chat template is broken: {error}", "messages") from error
            self._compiled[name] = template, self._takes_parts(template)
        return self._compiled[name]

    def _takes_parts(self, template: jinja2.Template) -> bool:
        """Some templates read content as a list of parts only; found by trying, as their sources differ too much."""

        def shows(content: object) -> bool:
            message = {"role": "user", "content": content}
            try:
                text = template.render(messages=[message], add_generation_prompt=True, **self._special_tokens)
            except Exception:  # a template that fails on the probe does not take content in this form
                return False
            return _PROBE in text

        return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def _renders(template: jinja2.Template, variables: Mapping[str, Any]) -> bool:
    try:
        template.render(variables)
    except Exception:
        return False
    return True


def _plain_message(index: int, message: Mapping[str, Any], takes_parts: bool) -> dict[str, Any]:
    """A deep copy in plain types, its content in the form the template reads, tool-call arguments as objects."""
    plain: dict[str, Any] = _plain(message, "messages")
    where = f"messages[{index}]"
    role = plain.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role is {role!r}, expected one of {', '.join(_ROLES)}", "messages")
    content = plain.get("content")
    if content is None:
        if role != "assistant" or not (plain.get("tool_calls") or plain.get("function_call")):
            raise InvalidRequest(f"{where}.content is missing", "messages")
        # As in vLLM: templates add content to text, or go through its parts, also where there is only a call.
        plain["content"] = [] if takes_parts else ""
    else:
        text = _content_text(content, where)
        plain["content"] = [{"type": "text", "text": text}] if takes_parts else text
    for call in plain.get("tool_calls") or ():
        _read_arguments(call)
    return plain


def _content_text(content: object, where: str) -> str:
    """A string, or OpenAI's list of text parts joined by newlines, as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise InvalidRequest(f"{where}.content is of type {kind}, expected a string or a list of parts", "messages")
    texts = []
    for i, part in enumerate(content):
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type != "text":
            raise InvalidRequest(
                f"{where}.content[{i}].type is {part_type!r}; this model reads 'text' only", "messages"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.content[{i}].text is missing or no string", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _read_arguments(call: object) -> None:
    """OpenAI sends the arguments of a tool call as JSON text, templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return  # the template gets what the client sent
        except RecursionError:
            raise _too_deep("messages") from None
        if isinstance(arguments, dict):
            function["arguments"] = _plain(arguments, "messages")


def _plain(value: Any, param: str, depth: int = 0) -> Any:
    """The value out of JSON types alone: nothing with methods of its own enters the sandbox. `param` is the field that
    is blamed for anything else."""
    if depth > _MAX_DEPTH:
        raise _too_deep(param)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, param, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, param, depth + 1) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise InvalidRequest(f"{param} holds a value of type {type(value).__name__}, expected JSON values", param)


def _too_deep(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} nests values more than {_MAX_DEPTH} levels deep; flatten them", param)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 -- the name and type jinja2 prescribes

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model expects."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
