"""The tokenizer that a GGUF file carries in its metadata, rebuilt as a `tokenizers` pipeline.

GGUF stores the vocabulary and names the rest: `tokenizer.ggml.model` the algorithm, `tokenizer.ggml.pre` how text was
split before merging. Sources: the GGUF specification (docs/gguf.md of ggml) for the fields, llama.cpp's vocabulary
loader for the meaning of `pre`. An unknown name is refused, since a wrong split gives a model words it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
    *("<|end_of_text|>", "<|endoftext|>", "<EOT>", "_<EOT>"),
)
"""Control tokens that end an answer, as llama.cpp has them; files written before `eot_token_id` existed name only one
end."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    backend: Backend
    prefix: tuple[int, ...]
    """Tokens before every text, and `suffix` those after it."""
    suffix: tuple[int, ...]
    eos_token_ids: frozenset[int]
    """Every token that ends an answer."""
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token` ... as a chat template names them."""
    chat_template: str | None


def read_gguf(fields: Mapping[str, Any]) -> GgufTokenizer:
    """Raises ValueError, naming the field that is missing, damaged or not supported."""
    model = _required(fields, "model")
    _required(fields, "tokens")
    tokens: Sequence[str] = _list(fields, "tokens", str)
    types: Sequence[int] = _list(fields, "token_type", int, len(tokens)) or [1] * len(tokens)
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    if model == "gpt2":
        backend = _byte_level(fields, tokens, pre)
    elif model == "llama":
        backend = _sentencepiece(fields, tokens)
    else:
        raise ValueError(f"tokenizer.ggml.model is {model!r}; supported are 'gpt2' and 'llama'")
    _add_special_tokens(backend, tokens, types)

    bos, eos = _token_id(fields, "bos", len(tokens)), _token_id(fields, "eos", len(tokens))
    ends = [_token_id(fields, name, len(tokens)) for name in ("eot", "eom")]
    by_name = [i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _END_OF_TURN]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token_id(fields, key, len(tokens)) for name, key in names.items()}
    has_bos = _flag(fields, "add_bos_token", model == "llama" or pre in _BEGINS_WITH_BOS)
    has_eos = _flag(fields, "add_eos_token", False)
    chat_template = fields.get("tokenizer.chat_template")
    if not (chat_template is None or isinstance(chat_template, str)):
        raise ValueError(f"tokenizer.chat_template is {chat_template!r}, expected a text")
    return GgufTokenizer(
        backend=backend,
        prefix=(bos,) if has_bos and bos is not None else (),
        suffix=(eos,) if has_eos and eos is not None else (),
        eos_token_ids=frozenset(i for i in (eos, *ends, *by_name) if i is not None),
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        chat_template=chat_template,
    )


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], pre: str) -> Backend:
    """Byte-level BPE (GPT-2's): text is cut by regular expressions, then bytes are merged."""
    if pre not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}, which is not supported; known are {', '.join(sorted(_SPLITS))}"
        )
    _required(fields, "merges")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(_bpe(vocab, _merges(fields), ignore_merges=pre in _IGNORES_MERGES))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    """Sentencepiece's BPE: the best-scored adjacent pair is merged first; unknown characters fall back to bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = _token_id(fields, "unknown", len(tokens))
    merges = _merges(fields)
    if not merges:
        _required(fields, "scores")
        merges = _merges_of_scores(vocab, _list(fields, "scores", (int, float), len(tokens)))
    unk_token = None if unknown is None else tokens[unknown]
    backend = Backend(_bpe(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    has_prefix = _flag(fields, "add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE_MARK)
    steps = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE_MARK), replace])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(steps)
    return backend


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges and tokenizer.ggml.tokens do not fit: {error}") from error


def _merges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are merged, the first to be merged first; none if the file has no such field."""
    merges = []
    for merge in _list(fields, "merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ValueError(f"tokenizer.ggml.merges has the entry {merge!r}, expected two tokens with a space between")
        merges.append((left, right))
    return merges


def _merges_of_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to build a token from two others, the best token first: the order in which sentencepiece merges."""
    merges = []
    for token, i in vocab.items():
        score = -float(scores[i])
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((score, i, vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control and user-defined tokens are found whole in a text, before any splitting."""
    control = [
        AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL
    ]
    known = [
        AddedToken(t, special=False, normalized=False)
        for t, kind in zip(tokens, types, strict=True)
        if kind == _USER_DEFINED
    ]
    backend.add_special_tokens([t for t in control if t.content])
    backend.add_tokens([t for t in known if t.content])


def _list(
    fields: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], num_tokens: int | None = None
) -> list[Any]:
    """The field's entries, each of `kinds`, and one per token where `num_tokens` is given; none without the field."""
    values = fields.get(f"tokenizer.ggml.{name}")
    if values is None:
        return []
    if not isinstance(values, list):
        raise ValueError(f"tokenizer.ggml.{name} is {values!r}, expected a list")
    for i, value in enumerate(values):
        if not isinstance(value, kinds):
            raise ValueError(f"tokenizer.ggml.{name}[{i}] is {value!r}, which is of the wrong type")
    if num_tokens is not None and len(values) != num_tokens:
        raise ValueError(f"tokenizer.ggml.{name} has {len(values)} entries for {num_tokens} tokens")
    return values


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"tokenizer.ggml.{name} is {value!r}, expected true or false")
    return value


def _required(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(f"tokenizer.ggml.{name}")
    if value is None or value == []:
        raise ValueError(
            f"the GGUF file has no field tokenizer.ggml.{name} or an empty one, so it carries no usable tokenizer"
        )
    return value


def _token_id(fields: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    """None also for a number that is no token: some files write one where there is no such token."""
    value = fields.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if not isinstance(value, int):
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {value!r}, expected the number of a token")
    return value if 0 <= value < num_tokens else None


_GPT_2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_SINGLE_DIGITS = (r"\p{N}", *_GPT_2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT_2, r"[0-9][0-9][0-9]")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _SYMBOLS_AND_SPACES,)
_QWEN_2 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _SYMBOLS_AND_SPACES,)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CAMEL_SYMBOLS}",
)
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CAMEL_SYMBOLS}",
)
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_SPLITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("default",), _DEFAULT),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais", "jina-en", "jina-es", "jina-de"), _GPT_2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA_3),
    **dict.fromkeys(("chatglm-bpe", "glm4", "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN_2),
    **dict.fromkeys(("falcon",), _FALCON),
    **dict.fromkeys(("tekken",), _TEKKEN),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT_4O),
    **dict.fromkeys(("deepseek-v3",), _DEEPSEEK_3),
}
"""By `tokenizer.ggml.pre`: patterns that are applied one after the other to the pieces of the one before."""

_IGNORES_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")
"""These take a piece that is in the vocabulary as one token, even where merges do not lead to it."""

_BEGINS_WITH_BOS = _IGNORES_MERGES
"""llama.cpp's default for files that do not say; sentencepiece begins with BOS as well."""
