"""The bundled model as a folder in Hugging Face's format, so that peers can serve the very same bfloat16 weights.

    python benchmarks/export_bundled.py FOLDER

Then `millrace serve FOLDER` and, for example, `../shared/tools/peer_vllm_cpu.sh FOLDER 8100`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from replicas.engine.gguf_tokenizer import read_gguf
from replicas.engine.models.gguf_model import GgufModel
from replicas.engine.models.source import resolve_source
from replicas.engine.models.transformer import TransformerConfig

MODEL = "bundled:smollm2-135m"


def llama_config(config: TransformerConfig, eos_token_ids: frozenset[int]) -> dict[str, Any]:
    """`config.json` of a plain Llama."""
    assert config.rope.scaling == "default", "only plain rope is written"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": sorted(eos_token_ids),
        "torch_dtype": "bfloat16",
    }


def export(folder: Path) -> None:
    checkpoint = GgufModel(resolve_source(MODEL))
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(checkpoint.transformer_config(), checkpoint.eos_token_ids())
    write_json(folder / "config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors(torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    tokenizer = read_gguf(checkpoint.tokenizer_fields())
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
        **tokenizer.special_tokens,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    export(folder)
    print(json.dumps({"benchmark": "export_bundled", "folder": str(folder)}))


if __name__ == "__main__":
    main()
