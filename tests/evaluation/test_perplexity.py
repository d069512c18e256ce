"""Nats by position: a uniform model, hand-worked windows, weights by tokens."""

import math

import pytest
import torch
from tiny import NATIVE, VOCABULARY, save_tiny, tiny_model
from torch.nn import functional as F
from yarn_tune.engines.agreement import transformers_logprobs
from yarn_tune.evaluation.perplexity import NllSum, bucket_edges, by_position, full_nll, slid_nll, span_nll
from yarn_tune.models.token_loss import CHUNK

IDS = torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(3))


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for nats in (full_nll(model, IDS), slid_nll(model, IDS, NATIVE, 16)):
        assert nats.shape == (199,)
        assert math.exp(nats.mean()) == pytest.approx(VOCABULARY, rel=1e-5)


def test_full_nll_equal_transformers():
    model = tiny_model()
    with torch.no_grad():
        logits = model(IDS[None], use_cache=False).logits[0, :-1]
    torch.testing.assert_close(full_nll(model, IDS), F.cross_entropy(logits, IDS[1:], reduction="none"))


@pytest.mark.parametrize("stride", [1, 16, 50, NATIVE])
def test_the_slid_window_predicts_each_token_from_native_tokens_only(stride):
    model = tiny_model()
    found = slid_nll(model, IDS, NATIVE, stride)
    assert found.shape == (199,)
    torch.testing.assert_close(found[: NATIVE - 1], full_nll(model, IDS[:NATIVE]))
    # A late token, by hand: its window ends at the next multiple of the stride past the native window.
    target = 150
    stride = min(stride, NATIVE - 1)
    end = min(NATIVE + math.ceil((target + 1 - NATIVE) / stride) * stride, 200)
    expected = full_nll(model, IDS[end - NATIVE : end])[target - (end - NATIVE) - 1]
    torch.testing.assert_close(found[target - 1], expected)
    assert torch.equal(slid_nll(model, IDS[:40], NATIVE, stride), full_nll(model, IDS[:40]))
    begun = torch.cat([torch.tensor([7]), IDS[end - NATIVE + 1 : end]])
    found = slid_nll(model, IDS, NATIVE, stride, prefix=(7,))[target - 1]
    torch.testing.assert_close(found, full_nll(model, begun)[target - (end - NATIVE) - 1])


def test_buckets_are_by_position_and_weighted_by_tokens():
    nats = torch.arange(1.0, 8.0)  # tokens 1 to 7 cost 1 to 7 nats
    assert bucket_edges(8, 2) == [0, 4, 8]
    first, second = by_position(nats, [0, 4, 8])
    assert (first, second) == (NllSum(6.0, 3), NllSum(22.0, 4))
    assert (first + second).mean == 4.0
    assert span_nll(nats, 1, 3) == NllSum(3.0, 2)
    assert math.isnan(NllSum(0.0, 0).mean)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere"])
@pytest.mark.parametrize("chunk", [1, 37, 64, 199, 500])
def test_chunks_over_a_kv_cache_change_nothing(family, chunk):
    model = tiny_model(family)
    torch.testing.assert_close(full_nll(model, IDS, chunk), full_nll(model, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_log_probabilities_beside_an_engines_are_those_of_whole_logits(tmp_path, family):
    """Also where logits are scaled, and over more tokens than have logits at one time."""
    base = save_tiny(tmp_path / "base", family)
    long = torch.randint(VOCABULARY, (2 * CHUNK + 9,), generator=torch.Generator().manual_seed(4))
    model = tiny_model(family)
    for prompt, found in zip((IDS, long), transformers_logprobs(str(base), [IDS.tolist(), long.tolist()]), strict=True):
        with torch.no_grad():
            logits = model(prompt[None], use_cache=False).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, prompt[1:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
