"""Models of given shapes with random weights on the engine's own parts: single steps, and an engine for loads.

Builds them without `worker.py` and `loader.py`, which want packages that a machine with a GPU may not have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch

from replicas.engine.batch import Batch, SamplingColumns, StepOutput
from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.engine import Engine
from replicas.engine.kernels.gpu import GpuKernels
from replicas.engine.kv_cache import KVShape, allocate
from replicas.engine.layers.rotary import RopeConfig
from replicas.engine.model_runner import ModelRunner
from replicas.engine.models.checkpoint import SamplingDefaults
from replicas.engine.models.transformer import Transformer, TransformerConfig
from replicas.engine.quant.unquantized import UnquantizedLinear
from replicas.engine.request import Request
from replicas.engine.sampler import Sampler
from replicas.engine.sampling_params import SamplingParams

BLOCK_SIZE = 32

QWEN3_06B = TransformerConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position=40_960,
    rope=RopeConfig(128, theta=1e6),
    tie_word_embeddings=True,
)
"""Qwen3-0.6B's shape in the Llama block: without Qwen3's norms of q and k, which this engine does not have yet."""

LLAMA_31_8B = TransformerConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position=131_072,
    rope=RopeConfig(128, theta=5e5),
)

MINIATURE = TransformerConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    max_position=512,
    rope=RopeConfig(32),
    dtype="float32",
)


def empty_model(config: TransformerConfig, device: torch.device) -> Transformer:
    kernels = GpuKernels(device, BLOCK_SIZE)
    method = UnquantizedLinear(kernels)
    with torch.device(device):
        return Transformer(config, kernels, method, method)


@torch.inference_mode()
def random_model(config: TransformerConfig, device: torch.device) -> Transformer:
    model = empty_model(config, device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
    model.finalize()
    return model


def block_bytes(config: TransformerConfig) -> int:
    dtype = getattr(torch, config.dtype)
    return KVShape.of(config, CacheConfig(block_size=BLOCK_SIZE), dtype).block_bytes


def linear_parameters(config: TransformerConfig) -> int:
    """Of one layer stack, the head left out."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_layer = qkv + config.num_heads * config.head_dim + 3 * config.intermediate_size
    return config.num_layers * config.hidden_size * per_layer


def head_parameters(config: TransformerConfig) -> int:
    return config.vocab_size * config.hidden_size


def make_batch(query_len: int, seq_len: int, num_requests: int, vocab_size: int, temperature: float) -> Batch:
    """Equal requests on blocks of their own; each draws a token."""
    blocks_each = -(-seq_len // BLOCK_SIZE)
    tables = np.arange(num_requests * blocks_each, dtype=np.int32).reshape(num_requests, blocks_each)
    positions = np.arange(seq_len - query_len, seq_len)
    slots = tables[:, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    zeros = np.zeros(num_requests, np.float32)
    columns = SamplingColumns(
        temperature=zeros + np.float32(temperature),
        top_p=zeros + 1,
        top_k=zeros.astype(np.int32),
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        seed=np.arange(num_requests, dtype=np.uint64),
        position=np.full(num_requests, seq_len, np.int64),
        num_logprobs=np.full(num_requests, -1, np.int32),
    )
    return Batch(
        request_ids=tuple(map(str, range(num_requests))),
        token_ids=np.random.default_rng(0).integers(vocab_size, size=num_requests * query_len),
        positions=np.tile(positions, num_requests),
        slot_mapping=slots.flatten(),
        query_start_loc=np.arange(num_requests + 1, dtype=np.int32) * query_len,
        seq_lens=np.full(num_requests, seq_len, np.int32),
        block_tables=tables,
        sampled_requests=np.arange(num_requests, dtype=np.int32),
        sampling=columns,
    )


class Rig:
    """A model over a cache of random values (what is measured should not attend to zeros), and its `Executor`."""

    kernels_name = "triton"
    phases_s: Mapping[str, float] = MappingProxyType({})

    def __init__(self, model: Transformer, num_blocks: int, device: torch.device) -> None:
        self.config, self.num_blocks, self.device = model.config, num_blocks, device
        dtype = getattr(torch, model.config.dtype)
        cache = allocate(KVShape.of(model.config, CacheConfig(block_size=BLOCK_SIZE), dtype), num_blocks, device)
        cache.normal_()
        self.runner = ModelRunner(model, cache, Sampler(model.config.vocab_size, device, model.kernels))

    def start(self) -> int:
        return self.num_blocks

    def execute(self, batch: Batch) -> StepOutput:
        return self.runner.run(batch)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """A step without its draws, which wait for the device."""
        self.runner._forward(batch)

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Facts:
    """The engine's `ModelFacts`."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


def make_engine(rig: Rig, max_tokens_per_step: int) -> Engine:
    scheduler = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=max_tokens_per_step)
    cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False)
    engine = Engine(
        EngineConfig(ModelConfig("random weights"), cache, scheduler),
        Facts(rig.config.max_position, rig.config.vocab_size),
        rig,
    )
    engine.start()
    return engine


Workload = Sequence[tuple[list[int], int]]
"""(prompt, tokens of output) of each request."""


def uniform_workload(num_requests: int, low: int, high: int, vocab_size: int, seed: int) -> Workload:
    rng = random.Random(seed)
    return [
        (rng.choices(range(vocab_size), k=rng.randint(low, high)), rng.randint(low, high)) for _ in range(num_requests)
    ]


def generate(engine: Engine, workload: Workload) -> list[list[int]]:
    """All at once, greedily, to their full lengths; the output tokens of each. Raises RuntimeError if one fails."""
    for i, (prompt, max_tokens) in enumerate(workload):
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add(Request(str(i), prompt, sampling))
    outputs: list[list[int]] = [[] for _ in workload]
    while engine.has_work:
        for output in engine.step():
            outputs[int(output.request_id)].extend(output.token_ids)
            if output.finish is not None and output.finish.error is not None:
                raise RuntimeError(output.finish.error)
    return outputs
