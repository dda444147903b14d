"""Drives a ModelRunner with hand-made batches: what a scheduler would send, for tests of the model alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replicas.engine.batch import Batch, SamplingColumns, StepOutput
from replicas.engine.config import CacheConfig
from replicas.engine.kernels import Kernels
from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.kv_cache import KVShape, allocate
from replicas.engine.model_runner import ModelRunner
from replicas.engine.models.loader import load_weights, open_checkpoint
from replicas.engine.models.transformer import Transformer
from replicas.engine.quant.unquantized import UnquantizedLinear


class GreedySampler:
    """A stand-in for `sampler.Sampler` that remembers the logits it was shown."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, columns: SamplingColumns) -> StepOutput:
        self.logits.append(logits.float().clone())
        return StepOutput(token_ids=logits.argmax(-1).cpu().numpy().astype(np.int64))


def greedy_columns(num_samples: int) -> SamplingColumns:
    zeros = np.zeros(num_samples, dtype=np.float32)
    return SamplingColumns(
        temperature=zeros,
        top_p=zeros + 1,
        top_k=np.zeros(num_samples, dtype=np.int32),
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        seed=np.zeros(num_samples, dtype=np.uint64),
        position=np.zeros(num_samples, dtype=np.int64),
        num_logprobs=np.full(num_samples, -1, dtype=np.int32),
    )


class PagedDriver:
    """Hands out blocks in random order, so that nothing works only because pages lie in a row."""

    def __init__(self, model: Transformer, block_size: int = 4, num_blocks: int = 64, seed: int = 0) -> None:
        dtype = model.embed.weight.dtype
        shape = KVShape.of(model.config, CacheConfig(block_size=block_size), dtype)
        self.sampler = GreedySampler()
        self.cache = allocate(shape, num_blocks, torch.device("cpu"))
        self.runner = ModelRunner(model, self.cache, self.sampler)
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[str, list[int]] = {}
        self.lens: dict[str, int] = {}

    def batch(self, pending: Mapping[str, Sequence[int]], sampled: Sequence[str] | None = None) -> Batch:
        """Gives every request its pending tokens; `sampled` draw one (all by default)."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for request, ids in pending.items():
            table, start = self.tables.setdefault(request, []), self.lens.get(request, 0)
            for position in range(start, start + len(ids)):
                if position // self.block_size == len(table):
                    table.append(self.free.pop())
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            tokens.extend(ids)
            starts.append(len(tokens))
            self.lens[request] = start + len(ids)
        names = list(pending)
        tables = np.zeros((len(names), max(len(self.tables[name]) for name in names)), dtype=np.int32)
        for row, name in enumerate(names):
            tables[row, : len(self.tables[name])] = self.tables[name]
        chosen = names if sampled is None else list(sampled)
        return Batch(
            request_ids=tuple(names),
            token_ids=np.array(tokens, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            slot_mapping=np.array(slots, dtype=np.int64),
            query_start_loc=np.array(starts, dtype=np.int32),
            seq_lens=np.array([self.lens[name] for name in names], dtype=np.int32),
            block_tables=tables,
            sampled_requests=np.array([names.index(name) for name in chosen], dtype=np.int32),
            sampling=greedy_columns(len(chosen)),
        )

    def step(self, pending: Mapping[str, Sequence[int]], sampled: Sequence[str] | None = None) -> StepOutput:
        return self.runner.run(self.batch(pending, sampled))

    def release(self, request: str) -> None:
        self.free.extend(self.tables.pop(request))
        del self.lens[request]

    def greedy(self, prompt: Sequence[int], num_tokens: int, chunk: int | None = None) -> tuple[list[int], Tensor]:
        """The continuation and its logits (num_tokens, vocab_size), prompt in chunks of `chunk` tokens."""
        self.sampler.logits.clear()
        chunk = chunk or len(prompt)
        pieces = [list(prompt[i : i + chunk]) for i in range(0, len(prompt), chunk)]
        for piece in pieces[:-1]:
            self.step({"r": piece}, sampled=[])
        self.sampler.logits.clear()
        tokens = [int(self.step({"r": pieces[-1]}).token_ids[0])]
        while len(tokens) < num_tokens:
            tokens.append(int(self.step({"r": tokens[-1:]}).token_ids[0]))
        self.release("r")
        return tokens, torch.cat(self.sampler.logits)


def build(path: Path, dtype: str = "float32", kernels: Kernels | None = None) -> Transformer:
    """The model in a folder or GGUF file, on the CPU, with the reference kernels unless others are given."""
    checkpoint = open_checkpoint(path)
    config = replace(checkpoint.transformer_config(), dtype=dtype)
    kernels = kernels or ReferenceKernels()
    method = UnquantizedLinear(kernels)
    model = Transformer(config, kernels, method, method)
    load_weights(model, checkpoint)
    return model
