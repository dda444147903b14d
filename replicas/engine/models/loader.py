"""From the name of a model to its description, its tokenizer and its loaded weights.

Where a source lies is `source.py`'s, the formats are `hf_folder.py`'s and `gguf_model.py`'s; this file tells formats
apart and checks that every tensor the transformer needs was there and none was left over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from replicas.engine.config import ModelConfig
from replicas.engine.models.checkpoint import Checkpoint, SamplingDefaults
from replicas.engine.models.gguf_model import GgufModel
from replicas.engine.models.hf_folder import HfFolder
from replicas.engine.models.source import resolve_source
from replicas.engine.models.transformer import Transformer, TransformerConfig

if TYPE_CHECKING:
    from replicas.engine.tokenizer import Tokenizer

_DERIVED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.bias$|\.masked_bias$")
"""Buffers that old checkpoints store although they follow from the configuration."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    architecture: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    sampling_defaults: SamplingDefaults
    transformer: TransformerConfig
    path: Path | None = None
    """Where the source was found; None: it has to be resolved."""


def read_model_info(config: ModelConfig) -> ModelInfo:
    """Raises ValueError with one sentence if the source is missing, damaged or not supported."""
    checkpoint = open_checkpoint(resolve_source(config.source))
    architecture, transformer = checkpoint.architecture(), checkpoint.transformer_config()
    _check_heads(transformer, checkpoint.path)
    _check_sizes(transformer, checkpoint)
    return ModelInfo(
        architecture=architecture,
        max_model_len=_max_model_len(config, transformer.max_position),
        vocab_size=transformer.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids(),
        sampling_defaults=checkpoint.sampling_defaults(),
        transformer=transformer,
        path=checkpoint.path,
    )


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's own tokenizer and chat template. Raises ValueError as `read_model_info` does."""
    from replicas.engine.tokenizer import Tokenizer

    path = resolve_source(config.source)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    fields = GgufModel(path).tokenizer_fields()
    try:
        return Tokenizer.from_gguf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """Fill every slot of `model`. Raises ValueError naming the file and the tensor that is missing, left over or
    of another shape than the configuration says."""
    dtype = getattr(torch, model.config.dtype)
    slots = model.weight_slots()
    missing = set(slots)
    for name, tensor in checkpoint.tensors(dtype):
        if name not in slots:
            if not (name == "lm_head.weight" or _DERIVED_TENSORS.search(name)):
                raise ValueError(f"{checkpoint.path}: this engine has no place for tensor {name}")
            continue
        try:
            slots[name](tensor)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: tensor {name} {error}") from error
        missing.discard(name)
    if missing:
        raise ValueError(f"{checkpoint.path}: {len(missing)} tensors are missing, among them {min(missing)}")
    model.finalize()


def open_checkpoint(path: Path) -> Checkpoint:
    return HfFolder(path) if path.is_dir() else GgufModel(path)


def _check_heads(config: TransformerConfig, path: Path) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{path}: {config.num_heads} query heads cannot share {config.num_kv_heads} K/V heads evenly")
    if config.rope.rotary_dim % 2 or not 0 < config.rope.rotary_dim <= config.head_dim:
        raise ValueError(f"{path}: {config.rope.rotary_dim} of {config.head_dim} channels cannot be rotated in pairs")


def _check_sizes(config: TransformerConfig, checkpoint: Checkpoint) -> None:
    """Before anything is built: a model of absurd size takes minutes or all memory, only to find no such weights."""
    shapes = checkpoint.tensor_shapes()
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if len(layers) != config.num_layers:
        raise ValueError(
            f"{checkpoint.path}: num_hidden_layers (in GGUF block_count) is {config.num_layers}, "
            f"but the weights are of {len(layers)} layers"
        )
    hidden = config.hidden_size
    expected = {
        "model.embed_tokens": (config.vocab_size, hidden),
        "model.layers.0.self_attn.q_proj": (config.num_heads * config.head_dim, hidden),
        "model.layers.0.self_attn.k_proj": (config.num_kv_heads * config.head_dim, hidden),
        "model.layers.0.mlp.up_proj": (config.intermediate_size, hidden),
    }
    for name, shape in expected.items():
        found = shapes.get(f"{name}.weight", shape)
        if found != shape:
            raise ValueError(
                f"{checkpoint.path}: tensor {name}.weight has shape {found}, the configuration says {shape}"
            )


def _max_model_len(config: ModelConfig, own: int) -> int:
    if config.max_model_len is None:
        return own
    if not 1 <= config.max_model_len <= own:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but {config.source} has a context of {own} tokens: "
            f"choose between 1 and {own}"
        )
    return config.max_model_len
