"""Sources, model descriptions and weights: what is missing, damaged or foreign is refused in one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from replicas.engine.config import ModelConfig
from replicas.engine.models.checkpoint import SamplingDefaults
from replicas.engine.models.loader import read_model_info
from replicas.engine.models.source import resolve_source
from tests.replicas.engine.paged_driver import PagedDriver, build

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=[2, 5],
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def info_of(folder: Path, **changes: Any) -> Any:
    return read_model_info(ModelConfig(str(folder), **changes))


def test_a_folder_is_described(folder: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "eos_token_id": [2, 9]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    info = info_of(folder)
    assert info.architecture == "LlamaForCausalLM"
    assert (info.max_model_len, info.vocab_size) == (128, 50)
    assert info.eos_token_ids == frozenset({2, 5, 9})
    assert info.sampling_defaults == SamplingDefaults(0.6, 0.9, 40, 1.1)
    assert info.transformer.dtype == "bfloat16"
    assert info.path == folder


def test_the_bundled_model_is_described() -> None:
    info = info_of(Path("bundled:smollm2-135m"))
    assert (info.max_model_len, info.vocab_size, info.eos_token_ids) == (8192, 49152, frozenset({2}))
    assert info.sampling_defaults == SamplingDefaults()
    assert (info.transformer.num_heads, info.transformer.num_kv_heads) == (9, 3)


def test_without_a_generation_config_nothing_is_recommended(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert info_of(folder).sampling_defaults == SamplingDefaults()


def test_the_context_can_be_shortened_but_not_stretched(folder: Path) -> None:
    assert info_of(folder, max_model_len=64).max_model_len == 64
    with pytest.raises(ValueError, match=r"max_model_len is 129.*context of 128 tokens"):
        info_of(folder, max_model_len=129)
    with pytest.raises(ValueError, match=r"max_model_len is 0"):
        info_of(folder, max_model_len=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 512),
        ({"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, 256),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 100}, 100),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 128),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 100, "use_sliding_window": False}, 128),
    ],
)
def test_scaling_stretches_the_context_and_a_window_limits_it(
    folder: Path, changes: dict[str, Any], expected: int
) -> None:
    edit(folder / "config.json", **changes)
    assert info_of(folder).max_model_len == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "wide"}, "'hidden_size' should be a number"),
        ({"num_attention_heads": 0}, "'num_attention_heads' should be positive"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 K/V heads"),
        ({"head_dim": 7}, "7 of 7 channels cannot be rotated"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling .*dynamic.* is not supported"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' should be a token id"),
        ({"architectures": 5}, "'architectures' should be a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "'architectures' should be a list of names"),
        ({"architectures": [["LlamaForCausalLM"]]}, "'architectures' should be a list of names"),
        ({"architectures": []}, "architecture none is not supported"),
        ({"max_position_embeddings": float("inf")}, "'max_position_embeddings' should be a number, not inf"),
        ({"max_position_embeddings": float("nan")}, "'max_position_embeddings' should be a number, not nan"),
        ({"max_position_embeddings": 2**40}, "'max_position_embeddings' should be positive and at most"),
        ({"max_position_embeddings": 10**400}, "'max_position_embeddings' should be a number"),
        ({"max_position_embeddings": 1.5}, "'max_position_embeddings' should be an integer"),
        ({"attention_bias": "no"}, "'attention_bias' should be true or false"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers .* is 20000, but the weights are of 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers .* is 1, but the weights are of 2 layers"),
        ({"hidden_size": 2**30, "head_dim": 8}, r"model.embed_tokens.weight has shape \(50, 32\), .*says \(50, 1073"),
        ({"intermediate_size": 2**30}, "mlp.up_proj.weight has shape"),
        ({"head_dim": 2**20}, "self_attn.q_proj.weight has shape"),
        ({"vocab_size": 2**30}, "model.embed_tokens.weight has shape"),
    ],
)
def test_configurations_that_we_cannot_run_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"model.*{message}"):
        info_of(folder)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ([1], "'rope_scaling' should be an object"),
        ("x", "'rope_scaling' should be an object, not 'x'"),
        ({"type": "linear", "factor": 0}, "'factor' should be above 0"),
        ({"type": "linear", "factor": 1e-9}, "'factor' of 1e-09 leaves no usable context"),
        ({"type": "linear", "factor": 1e299}, "'factor' of 1e.299 leaves no usable context"),
        ({"type": "linear", "factor": "2"}, "'factor' should be a number"),
        ({"type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "'rope_theta' should be above 1"),
        ({"type": "yarn", "factor": -1}, "'factor' should be above 0"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 0}, "'beta_slow' should be above 0"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "'original_max_pos.*positive"),
        (
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "'high_freq_factor' should be above 4",
        ),
    ],
)
def test_rope_scalings_that_make_no_sense_are_refused(folder: Path, scaling: object, message: str) -> None:
    edit(folder / "config.json", rope_parameters=..., rope_theta=1e4, rope_scaling=scaling)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        info_of(folder)


def test_missing_weights_are_told_before_anything_is_built(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", num_hidden_layers=20_000)
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        info_of(folder)


def test_shards_load_like_one_file(folder: Path) -> None:
    tokens, _ = PagedDriver(build(folder)).greedy([1, 2, 3], 10)
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: whole[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert PagedDriver(build(folder)).greedy([1, 2, 3], 10)[0] == tokens
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no b\.safetensors"):
        build(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for part in (data[: len(data) // 2], data[:4], b"", b"\xff" * 64):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or is not"):
            build(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        build(folder)


def test_tensors_too_few_too_many_or_misshapen_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != norm}, file)
    with pytest.raises(ValueError, match=r"1 tensors are missing, among them model\.layers\.1\.input"):
        build(folder)
    save_file(whole | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, file)
    with pytest.raises(ValueError, match=r"no place for tensor model\.layers\.0\.self_attn\.q_norm"):
        build(folder)
    save_file(whole | {norm: torch.ones(31)}, file)
    with pytest.raises(ValueError, match=rf"tensor {norm} has shape \(31,\).*\(32,\)"):
        build(folder)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    build(folder)


def test_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (str(tmp_path / "nothing"), "there is no model folder or .gguf file at"),
        ("model.gguf", "there is no model folder or .gguf file at model.gguf"),
        ("./some where", "there is no model folder"),
        (str(tmp_path / "notes.txt"), "neither a model folder nor a .gguf file"),
        (str(tmp_path / "empty"), "empty has no config.json"),
        ("bundled:gpt-9", "no bundled model 'gpt-9'; choose from smollm2-135m"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model_info(ModelConfig(source))


def test_a_hub_id_is_downloaded_without_pickles_and_subfolders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("someone/some-model") == folder
    assert asked["repo_id"] == "someone/some-model"
    wanted = filter_repo_objects(
        ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "onnx/config.json", "README.md"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, **arguments: Any) -> str:
        raise ConnectionError("name resolution failed\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"^there is no folder a/b here and the hub could not be asked: name res"):
        resolve_source("a/b")
