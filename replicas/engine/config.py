"""What an engine is built from: frozen values that flow down by constructor. Reads no file and no environment.

Values discovered later (blocks that fit, the model's context) are returned by the parts that discover them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`source`: a folder in Hugging Face format, a `.gguf` file, a hub id, or `bundled:NAME`."""

    source: str
    dtype: str = "auto"
    """`auto` (the checkpoint's, bfloat16 for GGUF), `bfloat16`, `float16` or `float32`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    quantization: str | None = None
    max_model_len: int | None = None
    """Context in tokens; None: the model's own."""
    kernels: str | None = None
    """The one override of `select_kernels`: the name of a kernel set."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Sizes of the paged KV cache. One of the three sizes decides, the first that is set."""

    block_size: int = 32
    num_blocks: int | None = None
    memory_bytes: int | None = None
    memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, workspace and KV cache may take together. Not read on a CPU, whose memory
    other programs need too: there the cache's size follows from what is free (`kv_cache.py`)."""
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queued_requests: int = 512
    """Requests waiting for their first step; one more is refused with `Overloaded`."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_threads: int | None = None
    """Compute threads; None: the cores this process may use."""
    stream_interval_ms: float = 30.0
    """Tokens wait about this long, for others to travel with; never the first of an answer, its end, or those of a
    request with stop strings (`outbox.py`)."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
