"""A model folder in Hugging Face's format: config.json, generation_config.json and memory-mapped safetensors.

Reads the JSON itself: importing transformers would cost seconds. Knows nothing of hubs and of devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replicas.engine.layers.rotary import RopeConfig, yarn_attention_factor
from replicas.engine.models.checkpoint import MAX_SIZE, Fields, SamplingDefaults
from replicas.engine.models.transformer import TransformerConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
DTYPES = ("bfloat16", "float16", "float32")


class HfFolder:
    """Raises ValueError if the folder has no readable config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Fields(_read_json(path / "config.json"), path / "config.json")
        generation = path / "generation_config.json"
        self.generation = Fields(_read_json(generation) if generation.exists() else {}, generation)

    def architecture(self) -> str:
        names = self.config.values.get("architectures") or []
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{self.config.path}: 'architectures' should be a list of names, not {names!r}")
        supported = [name for name in names if name in ARCHITECTURES]
        if not supported:
            raise ValueError(
                f"{self.config.path}: architecture {', '.join(names) or 'none'} is not supported; "
                f"this engine runs {', '.join(ARCHITECTURES)}"
            )
        return str(supported[0])

    def transformer_config(self) -> TransformerConfig:
        config = self.config
        architecture = self.architecture()
        activation = config.text("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(f"{config.path}: hidden_act {activation!r} is not supported; only 'silu' is")
        hidden, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
        has_bias = config.flag("attention_bias", False) and architecture == "LlamaForCausalLM"
        rope = _rope(config, config.size("head_dim", hidden // num_heads))
        return TransformerConfig(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=config.size("intermediate_size"),
            num_layers=config.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.size("num_key_value_heads", num_heads),
            head_dim=config.size("head_dim", hidden // num_heads),
            rms_norm_eps=config.real("rms_norm_eps", 1e-6),
            max_position=self._max_position(rope),
            rope=rope,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            has_qkv_bias=has_bias or architecture == "Qwen2ForCausalLM",
            has_output_bias=has_bias,
            has_mlp_bias=config.flag("mlp_bias", False),
            dtype=self._dtype(),
        )

    def eos_token_ids(self) -> frozenset[int]:
        return self.generation.token_ids("eos_token_id") | self.config.token_ids("eos_token_id")

    def sampling_defaults(self) -> SamplingDefaults:
        return SamplingDefaults(
            temperature=self.generation.optional_real("temperature"),
            top_p=self.generation.optional_real("top_p"),
            top_k=self.generation.optional_integer("top_k"),
            repetition_penalty=self.generation.optional_real("repetition_penalty"),
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files():
            with _open_tensors(path) as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Tensors lie in the mapped files and keep the file's dtype: copy them before the iterator moves on."""
        for path in self._weight_files():
            with _open_tensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, file.get_tensor(name)

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: 'weight_map' is missing or empty")
            files = [self.path / str(name) for name in sorted(set(shards.values()))]
        else:
            files = [self.path / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{self.path} has no {file.name}: the weights (safetensors) are missing or incomplete")
        return files

    def _dtype(self) -> str:
        name = self.config.text("dtype", self.config.text("torch_dtype", "float32")).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"{self.config.path}: dtype {name!r} is not supported; only {', '.join(DTYPES)} are")
        return name

    def _max_position(self, rope: RopeConfig) -> int:
        """The trained length, stretched as the scaling says, and no longer than a sliding window: inside the window
        full attention is what the model computes."""
        length = self.config.size("max_position_embeddings")
        if rope.scaling == "linear":
            length = self._stretched(length, rope.factor)
        elif rope.scaling == "yarn":
            length = max(length, self._stretched(rope.original_max_position, rope.factor))
        has_window = self.config.flag("use_sliding_window", "sliding_window" in self.config)
        return min(length, self.config.size("sliding_window", length)) if has_window else length

    def _stretched(self, length: int, factor: float) -> int:
        if not 1 <= length * factor <= MAX_SIZE:
            raise ValueError(f"{self.config.path}: rope scaling by a 'factor' of {factor:g} leaves no usable context")
        return int(length * factor)


def _rope(config: Fields, head_dim: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    values = config.mapping("rope_scaling") | config.mapping("rope_parameters")
    rope = Fields(values, config.path)
    scaling = rope.text("rope_type", rope.text("type", "default"))
    partial = rope.real("partial_rotary_factor", config.real("partial_rotary_factor", 1.0))
    theta = rope.real("rope_theta", config.real("rope_theta", 10_000.0), above=1)
    rotary_dim = int(head_dim * partial)
    trained = config.size("max_position_embeddings")
    original = rope.size("original_max_position_embeddings", trained)
    if scaling == "default":
        return RopeConfig(rotary_dim, theta)
    if scaling == "linear":
        return RopeConfig(rotary_dim, theta, "linear", rope.real("factor", above=0))
    if scaling == "llama3":
        low = rope.real("low_freq_factor", above=0)
        high = rope.real("high_freq_factor", above=low)
        return RopeConfig(rotary_dim, theta, "llama3", rope.real("factor", above=0), original, low, high)
    if scaling == "yarn" and "mscale" not in rope:
        factor = rope.real("factor", trained / original, above=0)
        return RopeConfig(
            rotary_dim,
            theta,
            "yarn",
            factor,
            original,
            beta_fast=rope.real("beta_fast", 32.0, above=0),
            beta_slow=rope.real("beta_slow", 1.0, above=0),
            attention_factor=rope.real("attention_factor", yarn_attention_factor(factor), above=0),
            is_truncated=rope.flag("truncate", True),
        )
    raise ValueError(f"{config.path}: rope scaling {values} is not supported; use default, linear, llama3 or yarn")


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or is not a safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{file.parent} has no {file.name}: it is not a model folder in Hugging Face format"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object")
    return content
