"""The loss without logits equals the plain one; packed rows equal their documents alone."""

import numpy as np
import pytest
import torch
from tiny import FAMILY_SIZES, NATIVE, VOCABULARY, tiny_model
from torch.nn import functional as F
from yarn_tune.data.packing import Row
from yarn_tune.data.positions import place_contiguous
from yarn_tune.models import token_loss as objectives
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.token_loss import IGNORED, NextToken, exact_nll, fused_nll, logit_transform
from yarn_tune.recipe.schema import Rope
from yarn_tune.training.batches import collate
from yarn_tune.tunable.attachment import attach
from yarn_tune.tunable.parameters import Start

CPU = torch.device("cpu")


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tuned(model, frequencies: str = "per_pair"):
    return attach(model, Start.of(rope_facts(model.config), Rope(window=4 * NATIVE)), frequencies)


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_equals_the_stock_loss(family):
    """transformers' own logits and cross entropy, for every family (some scale their logits)."""
    model = tiny_model(family)
    batch = collate([place_contiguous(Row(np.array(tokens(50)), (50,)))], CPU)
    logits = model(batch["input_ids"], use_cache=False).logits.float()
    expected = F.cross_entropy(logits[0], batch["labels"][0], ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(NextToken(model)(**batch), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(NextToken(model, fused=False)(**batch), expected, rtol=1e-5, atol=1e-4)


def test_fused_and_chunked_agree_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", 16)
    head = torch.nn.Linear(32, VOCABULARY).requires_grad_(False)
    labels = torch.tensor(tokens(100))
    results = []
    for nats_of in (lambda h: exact_nll(h, labels, head, None), lambda h: fused_nll(h, labels, head)):
        hidden = torch.randn(100, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        nats = nats_of(hidden)
        nats.sum().backward()
        results.append((nats.detach(), hidden.grad))
    plain = F.cross_entropy(head(hidden), labels, reduction="none")
    for nats, gradient in results:
        torch.testing.assert_close(nats, plain)
        torch.testing.assert_close(gradient, results[0][1])


def test_bfloat16_sums_are_not_rounded():
    """Summed by the operator itself, thousands of bfloat16 nats would keep 8 bits."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, VOCABULARY, bias=False).bfloat16().requires_grad_(False)
    hidden = torch.randn(4000, 32, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(VOCABULARY, (4000,), generator=generator)
    exact = exact_nll(hidden, labels, head, None).double().sum().item()
    assert fused_nll(hidden, labels, head).double().sum().item() == pytest.approx(exact, rel=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_equals_its_documents_alone(attention):
    """Forward and backward: borders are found from positions, and nothing leaks across them."""
    lengths = [30, 50, 20]
    texts = [tokens(n, seed) for seed, n in enumerate(lengths)]
    model = tiny_model(attn_implementation=attention)
    rotary = tuned(model)
    together = NextToken(model)(**collate([place_contiguous(Row(np.array(sum(texts, [])), tuple(lengths)))], CPU))
    together.backward()
    gradient = [p.grad.clone() for p in rotary.parameters()]
    rotary.zero_grad()
    alone = sum(NextToken(model)(**collate([place_contiguous(Row(np.array(t), (len(t),)))], CPU)) for t in texts)
    alone.backward()
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    for packed, parameter in zip(gradient, rotary.parameters(), strict=True):
        torch.testing.assert_close(packed, parameter.grad, rtol=1e-4, atol=1e-5)
    mixed = NextToken(model)(**collate([place_contiguous(Row(np.array(sum(texts, [])), (100,)))], CPU))
    assert abs(mixed.item() - together.item()) > 0.1, "isolation must matter for this test to mean anything"


def test_full_logits_never_exist(monkeypatch):
    """No tensor of [tokens, vocabulary] is made, forward or backward: the head sees one chunk at a time."""
    monkeypatch.setattr(objectives, "CHUNK", 32)
    model = tiny_model()
    tuned(model)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0]))
    NextToken(model, fused=False)(**collate([place_contiguous(Row(np.array(tokens(200)), (200,)))], CPU)).backward()
    assert sizes
    assert max(sizes) <= 32


def test_logit_transforms_are_the_families_own():
    assert logit_transform(tiny_model("llama").config) is None
    assert logit_transform(tiny_model("cohere").config)(torch.ones(1)).item() == 0.0625
