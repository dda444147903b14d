"""Chat templates: the same text as transformers, and every mistake of a client named."""

from __future__ import annotations

from typing import Any

import pytest

from replicas.engine.chat_template import ChatTemplate
from replicas.types import ChatPrompt, InvalidRequest
from tests.replicas.engine.bundled_vocabulary import bundled_fields, bundled_tokenizer

CHATML = bundled_fields()["tokenizer.chat_template"]
STRICT = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = message.content | trim %}
{%- endfor %}
{% if tools is not none %}
    tools: {{ tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {{- '[U]' + message['content'] | trim + '[/U]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '[C]' + call.function.name }} {{ call.function.arguments | tojson }}[/C]
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- elif message.role == 'tool' %}[T]{{ message.content }}[/T]
    {%- else %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{%- endfor %}
{{- ns.system }} {{ strftime_now('%Y') | length }} {{ mood | default('calm') }}
{%- if add_generation_prompt %}[A]{% endif %}"""
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part['text'] }}|{% endfor %}{% endfor %}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": "<b>&\n é 你</b>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "content": "rain"},
    ],
]
TOOL = {"type": "function", "function": {"name": "w", "description": "<weather>", "parameters": {"type": "object"}}}


def render(source: str, *messages: dict[str, Any], **prompt: Any) -> str:
    return ChatTemplate({"default": source}, TOKENS).render(ChatPrompt(messages, **prompt))


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHATML, STRICT])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("with_tools", [False, True])
def test_renders_what_transformers_renders(source: str, chat: list[dict[str, Any]], with_tools: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for add_generation_prompt in (False, True):
        (theirs,), _ = render_jinja_template(
            [chat],
            tools=[TOOL] if with_tools else None,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            mood="glad",
            **TOKENS,
        )
        ours = render(
            source,
            *chat,
            tools=(TOOL,) if with_tools else (),
            add_generation_prompt=add_generation_prompt,
            template_kwargs={"mood": "glad"},
        )
        assert ours == theirs


def test_the_bundled_template() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode_chat(ChatPrompt(({"role": "system", "content": "S"}, {"role": "user", "content": "U 👩"})))
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU 👩<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert ids[0] == 1, "special tokens of the template are tokens"


def test_the_strict_template() -> None:
    assert render(STRICT, {"role": "user", "content": " x "}) == "<s>[U]x[/U] 4 calm[A]"


def test_text_parts_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "[U]a\nb[/U]" in render(STRICT, {"role": "user", "content": parts})


def test_a_template_that_wants_parts_gets_them() -> None:
    assert render(PARTS, {"role": "user", "content": "a"}) == "a|"


def test_tool_calls_arrive_as_objects() -> None:
    call = {"type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert '[C]w {"a": 1}[/C]' in render(STRICT, {"role": "user", "content": "x"}, answer)


@pytest.mark.parametrize("calls", ["tool_calls", "function_call"])
def test_a_call_without_content_reads_as_empty_content(calls: str) -> None:
    call: Any = [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]
    answer = {"role": "assistant", "content": None, calls: call if calls == "tool_calls" else call[0]["function"]}
    assert render("{% for m in messages %}<{{ m.content + '' }}>{% endfor %}", answer) == "<>"
    assert render(PARTS, {"role": "user", "content": "a"}, answer) == "a|"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]\.content is missing"),
        ([{"content": "x"}], r"messages\[0\]\.role is None"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\]\.role is 'wizard', expected one of"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]\.type is 'image_url'"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]\.type is None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text is missing"),
        ([{"role": "user", "content": "x", "name": object()}], "value of type object"),
        ([{"role": "function", "content": "x"}], "refuses these messages: no role function"),
    ],
)
def test_a_mistake_in_the_messages_is_named(messages: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        render(STRICT, *messages)
    assert caught.value.param == "messages"


def test_template_arguments_cannot_replace_the_request() -> None:
    with pytest.raises(InvalidRequest, match="messages is set by the request") as caught:
        render(CHATML, {"role": "user", "content": "x"}, template_kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def nest(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": [value]}
    return value


def test_values_nest_as_deep_as_any_schema_does() -> None:
    answer = {"role": "assistant", "content": "x", "extra": nest(40)}
    render(STRICT, answer, tools=({"parameters": nest(40)},), template_kwargs={"mood": nest(40)})


@pytest.mark.parametrize("levels", [60, 300, 20_000])
@pytest.mark.parametrize("param", ["messages", "arguments", "tools", "chat_template_kwargs"])
def test_deep_nesting_is_refused_on_its_own_field(param: str, levels: int) -> None:
    text = '{"a": [' * levels + "1" + "]}" * levels
    message: dict[str, Any] = {"role": "assistant", "content": "x", "extra": nest(levels) if param == "messages" else 0}
    if param == "arguments":
        message["tool_calls"] = [{"type": "function", "function": {"name": "w", "arguments": text}}]
    tools = ({"parameters": nest(levels)},) if param == "tools" else ()
    kwargs = {"mood": nest(levels)} if param == "chat_template_kwargs" else {}
    with pytest.raises(InvalidRequest, match="more than 100 levels deep") as caught:
        render(STRICT, message, tools=tools, template_kwargs=kwargs)
    assert caught.value.param == ("messages" if param == "arguments" else param)


@pytest.mark.parametrize("kwargs", [{"mood": object()}, {"strftime_now": "x"}, {"bos_token": {}, "self": 1}])
def test_template_arguments_are_blamed_for_what_they_break(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ bos_token + strftime_now('%Y') }}", {"role": "user", "content": "x"}, template_kwargs=kwargs)
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(InvalidRequest, match="no role function") as caught:
        render(STRICT, {"role": "function", "content": "x"}, template_kwargs={"mood": "glad"})
    assert caught.value.param == "messages"


def test_a_template_cannot_leave_its_sandbox() -> None:
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% set x = messages.append(1) %}{{ messages }}"):
        with pytest.raises(InvalidRequest, match="refuses these messages"):
            render(source, {"role": "user", "content": "x"})


def test_a_broken_template_is_reported() -> None:
    with pytest.raises(InvalidRequest, match="chat template is broken"):
        render("{% if %}", {"role": "user", "content": "x"})


def test_a_lone_surrogate_in_a_message() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        bundled_tokenizer().encode_chat(ChatPrompt(({"role": "user", "content": "\ud800"},)))
    assert caught.value.param == "messages"
