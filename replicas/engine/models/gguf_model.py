"""A model in a GGUF file: its metadata as a `TransformerConfig`, its tensors under Hugging Face's Llama names.

The container is `gguf.py`'s. What the converter of llama.cpp changed is undone here: the rows of q and k, which it
interleaves for the llama architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicas.engine.layers.rotary import RopeConfig, yarn_attention_factor
from replicas.engine.models.checkpoint import Fields, SamplingDefaults
from replicas.engine.models.gguf import GgufFile
from replicas.engine.models.transformer import TransformerConfig

ARCHITECTURES = ("llama", "qwen2")

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"


class GgufModel:
    """Raises ValueError if the file is damaged or its architecture is not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.fields = Fields(self.file.fields, path)

    def architecture(self) -> str:
        name = self.fields.text("general.architecture", "none")
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: architecture {name} is not supported; "
                f"of GGUF files this engine runs {', '.join(ARCHITECTURES)}"
            )
        return name

    def transformer_config(self) -> TransformerConfig:
        arch, fields = self.architecture(), self.fields
        if fields.integer(f"{arch}.expert_count", 0):
            raise ValueError(f"{self.path}: mixtures of experts are not supported")
        hidden, num_heads = fields.size(f"{arch}.embedding_length"), fields.size(f"{arch}.attention.head_count")
        head_dim = fields.size(f"{arch}.attention.key_length", hidden // num_heads)
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None:
            raise ValueError(f"{self.path}: tensor token_embd.weight is missing")
        tensors = self.file.tensors
        return TransformerConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=fields.size(f"{arch}.feed_forward_length"),
            num_layers=fields.size(f"{arch}.block_count"),
            num_heads=num_heads,
            num_kv_heads=fields.size(f"{arch}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.real(f"{arch}.attention.layer_norm_rms_epsilon"),
            max_position=fields.size(f"{arch}.context_length"),
            rope=self._rope(arch, head_dim),
            tie_word_embeddings="output.weight" not in tensors,
            has_qkv_bias="blk.0.attn_q.bias" in tensors,
            has_output_bias="blk.0.attn_output.bias" in tensors,
            has_mlp_bias="blk.0.ffn_down.bias" in tensors,
            dtype="bfloat16",
        )

    def eos_token_ids(self) -> frozenset[int]:
        """The end of the sequence and, where the file tells them apart, of a turn and of a message."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        return frozenset().union(*(self.fields.token_ids(f"tokenizer.ggml.{key}") for key in keys))

    def sampling_defaults(self) -> SamplingDefaults:
        return SamplingDefaults(
            temperature=self.fields.optional_real("general.sampling.temp"),
            top_p=self.fields.optional_real("general.sampling.top_p"),
            top_k=self.fields.optional_integer("general.sampling.top_k"),
            repetition_penalty=self.fields.optional_real("general.sampling.penalty_repeat"),
        )

    def tokenizer_fields(self) -> dict[str, Any]:
        return {key: value for key, value in self.file.fields.items() if key.startswith("tokenizer.")}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {_checkpoint_name(name): info.shape for name, info in self.file.tensors.items() if name != _ROPE_FREQS}

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        config = self.transformer_config()
        is_interleaved = self.architecture() == "llama"
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if is_interleaved else {}
        for name in self.file.tensors:
            if name == _ROPE_FREQS:
                continue
            tensor = self.file.read(name, dtype)
            num_heads = next((count for part, count in heads.items() if f".{part}." in name), None)
            if num_heads is not None:
                if tensor.shape[0] % (2 * num_heads):
                    raise ValueError(f"{self.path}: the rows of {name} do not divide into {num_heads} heads of halves")
                tensor = _uninterleave(tensor, num_heads)
            yield _checkpoint_name(name), tensor

    def _rope(self, arch: str, head_dim: int) -> RopeConfig:
        fields = self.fields
        rotary_dim = fields.size(f"{arch}.rope.dimension_count", head_dim)
        theta = fields.real(f"{arch}.rope.freq_base", 10_000.0, above=1)
        scaling = fields.text(f"{arch}.rope.scaling.type", "none")
        factor = fields.real(f"{arch}.rope.scaling.factor", fields.real(f"{arch}.rope.scale_linear", 1.0), above=0)
        if _ROPE_FREQS in self.file.tensors:
            divisors = tuple(self.file.read(_ROPE_FREQS, torch.float32).flatten().tolist())
            if len(divisors) != rotary_dim // 2 or min(divisors) <= 0:
                raise ValueError(f"{self.path}: tensor {_ROPE_FREQS} should hold {rotary_dim // 2} positive values")
            return RopeConfig(rotary_dim, theta, freq_divisors=divisors)
        if scaling == "yarn":
            trained = fields.size(f"{arch}.context_length")
            original = fields.size(f"{arch}.rope.scaling.original_context_length", trained)
            attention = fields.real(f"{arch}.rope.scaling.attn_factor", 1.0, above=0) * yarn_attention_factor(factor)
            return RopeConfig(rotary_dim, theta, "yarn", factor, original, attention_factor=attention)
        if scaling == "linear" or (scaling == "none" and factor != 1.0):
            return RopeConfig(rotary_dim, theta, "linear", factor)
        if scaling == "none":
            return RopeConfig(rotary_dim, theta)
        raise ValueError(f"{self.path}: rope scaling {scaling!r} is not supported; use none, linear or yarn")


def _checkpoint_name(name: str) -> str:
    """GGUF's name as Hugging Face's; a name that we do not know comes back as it is, for the loader to refuse."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _uninterleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a head from pairs (0, h, 1, h + 1, ...) back to halves (0, 1, ..., h, h + 1, ...)."""
    pairs = tensor.view(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
