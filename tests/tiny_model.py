"""A Llama of a few thousand weights in Hugging Face format, for tests that need a real model and not its wits.

Its random weights emit arbitrary bytes, incomplete UTF-8 included, which is what a detokenizer has to survive.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = ("the quick brown fox jumps over the lazy dog and asks why the sky is blue", "größer 東京 emoji 🙂 naïve café")


def save_tiny_model(folder: Path, seed: int = 0, max_position_embeddings: int = 512) -> Path:
    """Write config, weights (fp32 safetensors), tokenizer and chat template; the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=tokenizer.token_to_id(SPECIAL[0]),
        eos_token_id=tokenizer.token_to_id(SPECIAL[2]),
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer
