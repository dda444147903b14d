"""The GGUF reader: values bit for bit those of gguf-py, metadata equal to its reader's, damage refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from replicas.engine.models import gguf as gguf_module
from replicas.engine.models.gguf import GgufFile
from replicas.engine.models.gguf_model import GgufModel
from replicas.engine.models.source import resolve_source
from tests.replicas.engine.paged_driver import PagedDriver, build

torch.set_num_threads(1)
Type = gguf.GGMLQuantizationType
FAST_TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0)
LIBRARY_TYPES = (Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q6_K)


@pytest.mark.parametrize("kind", FAST_TYPES + LIBRARY_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk_values", [1 << 15, 700])
def test_values_equal_gguf_py_bit_for_bit(
    kind: Any, chunk_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "_CHUNK_VALUES", chunk_values)
    packed = _random_blocks(kind, rows=6, columns=512)
    file = _write(tmp_path / "one.gguf", {"w": (packed, kind)})
    values = GgufFile(file).read("w", torch.float32)
    expected = dequantize(packed, kind)
    assert values.shape == (6, 512)
    assert np.array_equal(values.numpy().view(np.uint32), expected.astype(np.float32).view(np.uint32))


def test_the_bundled_files_metadata_equals_gguf_pys_reader() -> None:
    path = resolve_source("bundled:smollm2-135m")
    ours, reader = GgufFile(path), gguf.GGUFReader(path)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.fields) == set(theirs)
    for name, field in theirs.items():
        # their parsing of a 49k vocabulary takes seconds: a slice of long arrays is enough
        expected = field.contents(slice(0, 500)) if len(field.data) > 500 else field.contents()
        value = ours.fields[name]
        assert (value[:500] if isinstance(value, list) else value) == expected, name
        assert len(field.data) == (len(value) if isinstance(value, list) else 1)
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        assert (info.shape, info.offset, info.num_bytes) == (
            tuple(tensor.shape.tolist()[::-1]),
            tensor.data_offset,
            tensor.n_bytes,
        )


def test_a_llama_in_gguf_equals_the_same_llama_in_a_folder(tmp_path: Path) -> None:
    model = _small_llama()
    model.save_pretrained(tmp_path / "folder")
    file = _write_llama(tmp_path / "model.gguf", model, rope_divisors=None)
    tokens, logits = PagedDriver(build(tmp_path / "folder")).greedy([1, 2, 3, 4, 5], 20)
    tokens_of_gguf, logits_of_gguf = PagedDriver(build(file)).greedy([1, 2, 3, 4, 5], 20)
    assert tokens_of_gguf == tokens
    torch.testing.assert_close(logits_of_gguf, logits, atol=1e-5, rtol=1e-5)


def test_rope_divisors_and_tied_heads_are_honoured(tmp_path: Path) -> None:
    file = _write_llama(tmp_path / "model.gguf", _small_llama(), rope_divisors=[1.0, 2.0, 4.0, 8.0])
    model = GgufModel(file)
    config = model.transformer_config()
    assert config.rope.freq_divisors == (1.0, 2.0, 4.0, 8.0)
    assert config.tie_word_embeddings
    transformer = build(file)
    head_weight = transformer.lm_head.packed
    assert isinstance(head_weight, torch.Tensor)
    assert head_weight.data_ptr() == transformer.embed.weight.data_ptr()
    assert torch.equal(transformer.rotary.inv_freq, _inverse_frequencies() / torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert model.eos_token_ids() == frozenset({2, 7})


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0, 0.999), seed=st.integers(0, 1000))
def test_a_truncated_file_is_refused_by_name(cut: float, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = _write(folder / "whole.gguf", {"w": (_random_blocks(Type.Q4_1, 4, 64), Type.Q4_1)}).read_bytes()
    # the writer pads the data's end; cut before the padding begins
    data = whole[: int(cut * (len(whole) - 32))]
    (folder / "part.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"part\.gguf"):
        GgufFile(folder / "part.gguf")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused_but_never_crashes(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    file = _write_llama_header_only(folder / "model.gguf")
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(bytes(data))
    # another exception than ValueError, or a message that does not name the file, fails the test
    outcome = ""
    try:
        GgufModel(file).transformer_config()
    except ValueError as error:
        outcome = str(error)
    assert outcome == "" or "model.gguf" in outcome


def test_foreign_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 a zip archive, not a model")
    with pytest.raises(ValueError, match=r"x\.gguf.*does not begin with 'GGUF'"):
        GgufFile(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="version 1"):
        GgufFile(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.gguf"):
        GgufFile(file)


def test_arrays_of_arrays_are_refused_however_deep(tmp_path: Path) -> None:
    file = tmp_path / "deep.gguf"
    nested = struct.pack("<IQ", 9, 1) * 20_000
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9) + nested)
    with pytest.raises(ValueError, match=r"deep\.gguf.*array of arrays"):
        GgufFile(file)


@pytest.mark.parametrize("shape", [(0,), (32, 0), (0, 2)])
def test_a_tensor_without_values_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    file = tmp_path / "empty.gguf"
    dimensions = struct.pack(f"<{len(shape)}Q", *shape)
    tensor = struct.pack("<Q1sI", 1, b"w", len(shape)) + dimensions + struct.pack("<IQ", 0, 0)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(64))
    with pytest.raises(ValueError, match=r"empty\.gguf.*tensor w of shape .* has no values"):
        GgufFile(file)


@pytest.mark.parametrize("divisors", [[1.0, 2.0], [1.0, 2.0, 4.0, 0.0]])
def test_rope_divisors_that_do_not_fit_are_refused(divisors: list[float], tmp_path: Path) -> None:
    file = _write_llama(tmp_path / "model.gguf", _small_llama(), rope_divisors=divisors)
    with pytest.raises(ValueError, match=r"model\.gguf: tensor rope_freqs\.weight should hold 4 positive values"):
        GgufModel(file).transformer_config()


def test_the_shapes_are_those_of_the_tensors(tmp_path: Path) -> None:
    model = GgufModel(_write_llama(tmp_path / "model.gguf", _small_llama(), rope_divisors=[1.0] * 4))
    assert model.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in model.tensors(torch.float32)}


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    file = _write(tmp_path / "m.gguf", {"w": (np.zeros((2, 32), np.float32), Type.F32)}, architecture="mamba")
    with pytest.raises(ValueError, match=r"m\.gguf: architecture mamba is not supported"):
        GgufModel(file).transformer_config()


def _random_blocks(kind: Any, rows: int, columns: int) -> Any:
    """Real scales with random payload: every code of every format occurs."""
    generator = np.random.default_rng(kind.value)
    values = generator.standard_normal((rows, columns)).astype(np.float32)
    try:
        return quantize(values, kind)
    except NotImplementedError:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = generator.integers(0, 256, (rows, columns // block_values, block_bytes), dtype=np.uint8)
        # no NaN among the fp16 scales, wherever they stand: clear the top exponent bit of every second byte
        blocks[..., 1::2] &= 0xBF
        return blocks.reshape(rows, -1)


def _write(
    path: Path, tensors: dict[str, tuple[Any, Any]], architecture: str = "llama", fields: dict[str, Any] | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields or {}).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "日本"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_FIELDS: dict[str, Any] = {
    "llama.embedding_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 64,
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 7,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def _small_llama() -> Any:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float().eval()


def _inverse_frequencies() -> torch.Tensor:
    """Of heads of 8 channels and a base of 10,000."""
    return torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float32)


def _write_llama(path: Path, model: Any, rope_divisors: list[float] | None) -> Path:
    """What llama.cpp's converter does to a Llama: other names, and the rows of q and k interleaved."""
    tensors: dict[str, tuple[Any, Any]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor.numpy()
        for projection, num_heads in (("attn_q", 4), ("attn_k", 2)):
            if projection in name:
                halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, -1)
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        tensors[name] = (values, Type.F32)
    if rope_divisors is not None:
        tensors["rope_freqs.weight"] = (np.array(rope_divisors, dtype=np.float32), Type.F32)
    return _write(path, tensors, fields=_FIELDS)


def _write_llama_header_only(path: Path) -> Path:
    return _write(path, {"token_embd.weight": (np.zeros((40, 32), np.float32), Type.F32)}, fields=_FIELDS)
