"""Stand-ins for the parts that need a model: an executor whose tokens betray any mistake of the control plane, and a
tokenizer of bytes. Everything above and beside them is real in the tests."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from replicas.engine.batch import Batch, Logprobs, StepOutput
from replicas.types import ChatPrompt, InvalidRequest

NUM_BYTES = 256
EOS, BOS, IM_START, IM_END = 256, 257, 258, 259
FAKE_VOCAB_SIZE = 260
SPECIAL_TOKENS = {EOS: "<|eos|>", BOS: "<|bos|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
LETTERS_AND_EOS = (*b"abcdefghijklmnopqrstuvwxyz ", EOS)
MASK = 2**64 - 1


@dataclass(frozen=True)
class FakeSamplingDefaults:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class FakeModelInfo:
    max_model_len: int = 256
    vocab_size: int = FAKE_VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset({EOS})
    sampling_defaults: FakeSamplingDefaults = FakeSamplingDefaults()


class FakeExecutor:
    """Stores for each token a digest of the token, its position and what the slot of the token before it holds, then
    draws as a pure function of (seed, position, all that is stored under the request's block table).

    So a wrong slot, a wrong block table, a block reused too early or a prefix hit under a wrong parent changes the
    tokens, as it would with real K and V.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        drawable: Sequence[int] = LETTERS_AND_EOS,
        step_s: float = 0.0,
        before_step: Callable[[Batch], None] = lambda batch: None,
        fail_row: Callable[[str], str | None] = lambda request_id: None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.drawable = tuple(drawable)
        self.step_s = step_s
        self.before_step = before_step
        self.fail_row = fail_row
        self.num_steps = 0
        self.num_tokens = 0
        self.is_shut_down = False
        self.kernels_name = "fake"
        self.phases_s: dict[str, float] = {}
        self._cache = np.zeros(num_blocks * block_size, np.uint64)

    def start(self) -> int:
        self.phases_s["load"] = 0.0
        return self.num_blocks

    def execute(self, batch: Batch) -> StepOutput:
        self.before_step(batch)
        if self.step_s:
            time.sleep(self.step_s)
        self.num_steps += 1
        self.num_tokens += len(batch.token_ids)
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping), "two tokens share a slot"
        for index in range(len(batch.request_ids)):
            self._store(batch, index)
        token_ids, logprobs, errors = [], {}, {}
        for row, index in enumerate(batch.sampled_requests.tolist()):
            if (error := self.fail_row(batch.request_ids[index])) is not None:
                errors[row] = error
                token_ids.append(-1)
                continue
            draw = self._draw(batch, row, index)
            token_ids.append(draw[0])
            if (num := int(batch.sampling.num_logprobs[row])) >= 0:
                ids = np.array(draw[:num], np.int64)
                logprobs[row] = Logprobs(-0.5, ids, np.linspace(-0.5, -5.0, len(ids), dtype=np.float32))
        return StepOutput(np.array(token_ids, np.int64), logprobs, errors)

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _store(self, batch: Batch, index: int) -> None:
        slots = self._slots(batch, index)
        start, end = batch.query_start_loc[index : index + 2].tolist()
        for row in range(start, end):
            position, slot = int(batch.positions[row]), int(batch.slot_mapping[row])
            before = int(self._cache[slots[position - 1]]) if position else 0
            self._cache[slot] = digest(before, int(batch.token_ids[row]), position)

    def _draw(self, batch: Batch, row: int, index: int) -> list[int]:
        """Candidates in falling order; the first is drawn."""
        stored = self._cache[self._slots(batch, index)]
        columns = batch.sampling
        greedy = columns.temperature[row] == 0.0
        seed = 0 if greedy else int(columns.seed[row])
        banned = {token for banned_row, tokens in columns.banned if banned_row == row for token in tokens}
        biased: Mapping[int, float] = next((bias for bias_row, bias in columns.logit_bias if bias_row == row), {})
        candidates = [token for token in self.drawable if token not in banned and biased.get(token, 0.0) > -100.0]
        key = digest(seed, int(columns.position[row]), int.from_bytes(blake2b(stored.tobytes()).digest()[:8]))
        first = key % len(candidates)
        return candidates[first:] + candidates[:first]

    def _slots(self, batch: Batch, index: int) -> NDArray[np.int64]:
        positions = np.arange(int(batch.seq_lens[index]))
        blocks = batch.block_tables[index, positions // self.block_size].astype(np.int64)
        slots: NDArray[np.int64] = blocks * self.block_size + positions % self.block_size
        return slots


def digest(*values: int) -> int:
    data = b"".join((value & MASK).to_bytes(8, "little") for value in values)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, seed: int = 0, drawable: Sequence[int] = LETTERS_AND_EOS
) -> list[int]:
    """What FakeExecutor must draw after `prompt`, from its definition and without blocks: the oracle."""
    tokens = list(prompt)
    stored: list[int] = []
    for position in range(len(prompt) + num_tokens - 1):
        if position >= len(tokens):
            tokens.append(_oracle_draw(stored, seed, drawable))
        stored.append(digest(stored[-1] if stored else 0, tokens[position], position))
    tokens.append(_oracle_draw(stored, seed, drawable))
    return tokens[len(prompt) :][:num_tokens]


def _oracle_draw(stored: Sequence[int], seed: int, drawable: Sequence[int]) -> int:
    history = np.array(stored, np.uint64).tobytes()
    return drawable[digest(seed, len(stored), int.from_bytes(blake2b(history).digest()[:8])) % len(drawable)]


@dataclass
class FakeTokenizer:
    """One token per byte of UTF-8, and a few special tokens."""

    eos_token_ids: frozenset[int] = frozenset({EOS})
    bos_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True, max_num_tokens: int | None = None) -> list[int]:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return prefix + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        stream = self.stream(skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> FakeTextStream:
        return FakeTextStream(skip_special_tokens)

    def encode_chat(self, prompt: ChatPrompt, max_num_tokens: int | None = None) -> list[int]:
        ids: list[int] = []
        for message in prompt.messages:
            if message.get("role") not in ("system", "user", "assistant"):
                raise InvalidRequest(f"unknown role {message.get('role')!r}", "messages")
            ids += [IM_START, *self.encode(f"{message['role']}\n{message['content']}", False), IM_END]
        return [*ids, IM_START, *self.encode("assistant\n", False)] if prompt.add_generation_prompt else ids

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id], False).encode()


class FakeTextStream:
    def __init__(self, skip_special_tokens: bool) -> None:
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id < NUM_BYTES:
            return self._decoder.decode(bytes([token_id]))
        return "" if self._skip_special_tokens else self._decoder.decode(SPECIAL_TOKENS[token_id].encode())

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
