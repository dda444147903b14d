"""One rank: its weights, its share of the KV cache, and the executor that runs it in this process.

Decides device, dtype and threads from the configuration, once; does not schedule and holds no request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from replicas.engine.batch import Batch, SamplingColumns, StepOutput
from replicas.engine.config import EngineConfig, ModelConfig
from replicas.engine.host import available_memory_bytes, usable_cores
from replicas.engine.kernels import Kernels, select_kernels
from replicas.engine.kv_cache import KVShape, allocate, choose_num_blocks, cpu_budget_bytes
from replicas.engine.model_runner import ModelRunner
from replicas.engine.models.loader import ModelInfo, load_weights, open_checkpoint
from replicas.engine.models.source import resolve_source
from replicas.engine.models.transformer import Transformer
from replicas.engine.quant.base import LinearMethod
from replicas.engine.quant.unquantized import UnquantizedLinear

_DTYPES = ("auto", "bfloat16", "float16", "float32")


class LocalExecutor:
    """The `Executor` of a single rank in this process. `kernels_name` and `phases_s` are filled by `start`."""

    def __init__(self, config: EngineConfig, info: ModelInfo) -> None:
        self._config = config
        self._info = info
        self._worker: Worker | None = None
        self.kernels_name = ""
        self.phases_s: dict[str, float] = {}

    def start(self) -> int:
        degree = self._config.tensor_parallel_size * self._config.pipeline_parallel_size
        if degree != 1:
            raise ValueError(
                f"tensor_parallel_size x pipeline_parallel_size is {degree}, but this executor runs one rank; "
                "set both to 1"
            )
        worker = Worker(self._config, self._info)
        num_blocks = worker.start()
        self._worker = worker
        self.kernels_name, self.phases_s = worker.kernels.name, worker.phases_s
        return num_blocks

    def execute(self, batch: Batch) -> StepOutput:
        assert self._worker is not None, "execute() before start() or after shutdown()"
        return self._worker.execute(batch)

    def shutdown(self) -> None:
        self._worker = None


class Worker:
    """Owner of one rank's weights and K/V tensors. Raises ValueError at birth if the configuration cannot be met."""

    def __init__(self, config: EngineConfig, info: ModelInfo) -> None:
        self.config = config
        self.info = info
        self.device = select_device(config.model.device)
        self.dtype = select_dtype(config.model, info.transformer.dtype)
        self.num_threads = config.num_threads or usable_cores()
        self.kernels = select_kernels(
            self.device, self.dtype, config.cache.block_size, self.num_threads, config.model.kernels
        )
        self.method = select_method(config.model.quantization, self.kernels)
        self.phases_s: dict[str, float] = {}

    def start(self) -> int:
        """Weights, a trial step, the KV cache; returns its number of blocks. Raises ValueError as `Executor.start`."""
        # loading is many small copies: shared out, they mostly wait for one another on a busy machine
        torch.set_num_threads(1)
        with self._phase("open"):
            checkpoint = open_checkpoint(self.info.path or resolve_source(self.config.model.source))
        with self._phase("load_weights"):
            transformer = replace(self.info.transformer, dtype=str(self.dtype).removeprefix("torch."))
            with torch.device(self.device):
                self.model = Transformer(transformer, self.kernels, self.method, self.method)
            load_weights(self.model, checkpoint)
        torch.set_num_threads(self.num_threads)
        with self._phase("trial_step"):
            workspace_bytes = self._run_largest_step()
        with self._phase("kv_cache"):
            num_blocks = self._choose_num_blocks(workspace_bytes)
            self.runner = self._make_runner(num_blocks)
        return num_blocks

    def execute(self, batch: Batch) -> StepOutput:
        return self.runner.run(batch)

    def _make_runner(self, num_blocks: int) -> ModelRunner:
        from replicas.engine.sampler import Sampler

        cache = allocate(self._kv_shape(), num_blocks, self.device)
        return ModelRunner(self.model, cache, Sampler(self.info.vocab_size, self.device, self.kernels))

    def _kv_shape(self) -> KVShape:
        return KVShape.of(self.info.transformer, self.config.cache, self.dtype)

    def _choose_num_blocks(self, workspace_bytes: int) -> int:
        shape, cache = self._kv_shape(), self.config.cache
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            budget = int(total * cache.memory_utilization) - (total - free) - workspace_bytes
        else:
            budget = cpu_budget_bytes(shape, available_memory_bytes(), self.info.max_model_len)
        return choose_num_blocks(shape, cache, budget, self.info.max_model_len, self.config.scheduler.max_num_seqs)

    def _run_largest_step(self) -> int:
        """One step over a cache of one block: on a GPU the largest there can be, returning the bytes it took beside
        the weights; on a CPU one token, which only shows that the model runs."""
        is_cuda = self.device.type == "cuda"
        scheduler, max_len = self.config.scheduler, self.info.max_model_len
        num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens) if is_cuda else 1
        num_tokens = scheduler.max_num_batched_tokens if is_cuda else 1
        batch = _trial_batch(num_seqs, num_tokens, max_len if is_cuda else 1, self.config.cache.block_size)
        runner = self._make_runner(1)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if is_cuda else 0
        runner.run(batch)
        if not is_cuda:
            return 0
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del runner
        torch.cuda.empty_cache()
        return peak

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases_s[name] = time.perf_counter() - start


def select_device(name: str) -> torch.device:
    """Raises ValueError if `name` is no device or not present."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one of auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here: this process sees {torch.cuda.device_count()} CUDA devices")
    return device


def select_dtype(config: ModelConfig, checkpoint: str) -> torch.dtype:
    """Raises ValueError naming the choices."""
    if config.dtype not in _DTYPES:
        raise ValueError(f"dtype {config.dtype!r} is not one of {', '.join(_DTYPES)}")
    dtype = getattr(torch, checkpoint if config.dtype == "auto" else config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def select_method(quantization: str | None, kernels: Kernels) -> LinearMethod:
    """Raises ValueError naming the choices."""
    if quantization is not None:
        raise ValueError(f"quantization {quantization!r} is not supported; leave it unset")
    return UnquantizedLinear(kernels)


def _trial_batch(num_seqs: int, num_tokens: int, max_len: int, block_size: int) -> Batch:
    """`num_seqs` sequences of `max_len` tokens, all on block 0: the first computes what the others leave of
    `num_tokens`, the others one token each."""
    first = min(max_len, num_tokens - (num_seqs - 1))
    query_lens = np.array([first] + [1] * (num_seqs - 1), dtype=np.int32)
    total = int(query_lens.sum())
    ones = np.ones(num_seqs, dtype=np.float32)
    columns = SamplingColumns(
        temperature=ones,
        top_p=ones * np.float32(0.9),
        top_k=np.zeros(num_seqs, dtype=np.int32),
        min_p=ones * 0,
        presence_penalty=ones * 0,
        frequency_penalty=ones * 0,
        repetition_penalty=ones,
        seed=np.zeros(num_seqs, dtype=np.uint64),
        position=np.full(num_seqs, max_len, dtype=np.int64),
        num_logprobs=np.zeros(num_seqs, dtype=np.int32),
    )
    return Batch(
        request_ids=tuple(f"trial-{i}" for i in range(num_seqs)),
        token_ids=np.zeros(total, dtype=np.int64),
        positions=np.zeros(total, dtype=np.int64),
        slot_mapping=np.arange(total, dtype=np.int64) % block_size,
        query_start_loc=np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32),
        seq_lens=np.full(num_seqs, max_len, dtype=np.int32),
        block_tables=np.zeros((num_seqs, -(-max_len // block_size)), dtype=np.int32),
        sampled_requests=np.arange(num_seqs, dtype=np.int32),
        sampling=columns,
    )
