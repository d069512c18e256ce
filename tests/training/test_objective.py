"""Objectives and the base as teacher, against plain computations from whole logits."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from tiny import NATIVE, VOCABULARY, tiny_model
from torch.nn import functional as F
from yarn_tune.data.packing import Row
from yarn_tune.data.positions import Placed, place_contiguous
from yarn_tune.evaluation.perplexity import slid_nll
from yarn_tune.models import token_loss as objectives
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.token_loss import IGNORED
from yarn_tune.recipe.schema import Rope, Train
from yarn_tune.training.batches import collate
from yarn_tune.training.objective import Objective, ObjectiveConfig
from yarn_tune.training.teacher import divergence, teacher_states, windows
from yarn_tune.training.terms import OBJECTIVES, Term, Weights
from yarn_tune.tunable.attachment import attach, base_model_active, detach
from yarn_tune.tunable.kinds import adjustments_for
from yarn_tune.tunable.parameters import Start

CPU = torch.device("cpu")
LENGTH = 3 * NATIVE + 10


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tuned(family: str = "llama", query_gains: str = "none", frequencies: str = "per_pair", **extra: object):
    model = tiny_model(family, **extra)
    start = Start.of(rope_facts(model.config), Rope(window=4 * NATIVE))
    rotary = attach(
        model,
        start,
        frequencies,
        adjustments_for(model.config.to_dict(), Rope(window=4 * NATIVE, query_gains=query_gains)),
    )
    with torch.no_grad():
        for number, parameter in enumerate(rotary.parameters()):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return model, rotary


def rows(count: int = 2, length: int = LENGTH) -> list[Placed]:
    return [place_contiguous(Row(np.array(tokens(length, seed)), (length,))) for seed in range(count)]


# The teacher.


@pytest.mark.parametrize("length", [10, NATIVE, NATIVE + 1, 3 * NATIVE, 3 * NATIVE + 17])
@pytest.mark.parametrize("stride", [1, 16, NATIVE - 1])
def test_windows_keep_every_token_once(length, stride):
    kept = []
    for end, count in windows(length, NATIVE, stride):
        assert min(NATIVE, length) <= end <= length
        assert count <= (stride if kept else NATIVE)
        kept += range(end - count, end)
    assert kept == list(range(length))


@pytest.mark.parametrize("prefix", [(), (7,), (7, 9)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere"])
def test_the_teacher_is_the_slid_native_window(family, prefix):
    """The same nats as `compare` measures for it, with the same stride."""
    model, rotary = tuned(family)
    row = torch.tensor(tokens(LENGTH + 1))
    row[: len(prefix)] = torch.tensor(prefix, dtype=row.dtype)
    taught = teacher_states(model, rotary, row[None, :-1], NATIVE - 1, 15, prefix)[0]
    head, transform = model.get_output_embeddings(), Objective(model, rotary, ObjectiveConfig()).transform
    nats = objectives.exact_nll(taught, row[1:], head, transform)
    detach(model)
    torch.testing.assert_close(nats, slid_nll(model, row, NATIVE, 15, prefix), rtol=1e-4, atol=1e-4)


def test_the_divergence_is_that_of_whole_softmaxes(monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", 16)
    head = torch.nn.Linear(32, VOCABULARY).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 32, generator=generator).requires_grad_()
    taught = torch.randn(50, 32, generator=generator)
    found = divergence(hidden, taught, head, None)
    found.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    logs = F.log_softmax(head(hidden), -1), F.log_softmax(head(taught), -1)
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, hidden.grad)
    assert divergence(taught, taught, head, None).abs().max() < 1e-6


# Objectives.


def test_every_objective_of_the_recipe_has_its_row():
    named = get_args(get_type_hints(Train)["objective"])
    assert set(OBJECTIVES) == {*named}
    for name in named:
        compares = Train(objective=name).compares_with_base
        assert (ObjectiveConfig(name).base_reads != "nothing") == compares
    assert ObjectiveConfig("next-token", short_context_kl=0.1).base_reads == "native"
    assert ObjectiveConfig("distill", short_context_kl=0.1).base_reads == "slid"
    assert ObjectiveConfig("preserve").base_reads == "native"


def test_a_new_objective_is_one_row(monkeypatch):
    """An objective made up here: the NLL of every other target, and nothing for the rest."""
    other = Term("nothing", lambda targets, weight: Weights(_alternate(targets) * weight, _alternate(targets) * 0.0))
    monkeypatch.setitem(OBJECTIVES, "alternate", other)
    model, rotary = tuned()
    batch = collate(rows(), CPU)
    found = Objective(model, rotary, ObjectiveConfig("alternate"))(**batch)
    nats, _ = plain(model, rotary, batch)
    nats = nats[batch["labels"] != IGNORED]
    torch.testing.assert_close(found[0], nats[::2].sum(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found[1], nats.sum(), rtol=1e-5, atol=1e-2)


def _alternate(targets):
    return (torch.arange(len(targets.answers)) % 2 == 0).float()


def plain(model, rotary, batch):
    """(nats of the tuned model, KL from the base in native windows) of every token, `[b, n]`, whole logits."""
    ids, labels = batch["input_ids"], batch["labels"].clamp(min=0)
    with torch.no_grad():
        logs = F.log_softmax(model(ids, use_cache=False).logits, -1)
        nats = -logs.gather(-1, labels[..., None])[..., 0]
        divergences = []
        with base_model_active(rotary):
            for i in range(ids.shape[1]):
                # Strides of half a native window: the window ends where the token's stride does.
                end = NATIVE if i < NATIVE else min(NATIVE + 32 * math.ceil((i + 1 - NATIVE) / 32), ids.shape[1])
                window = model(ids[:, end - NATIVE : end], use_cache=False).logits[:, i - end]
                said = F.log_softmax(window, -1)
                divergences.append((said.exp() * (said - logs[:, i])).sum(-1))
    return nats, torch.stack(divergences, 1)


@pytest.mark.parametrize("objective", ["next-token", "distill", "preserve"])
@pytest.mark.parametrize("guard", [0.0, 0.7])
def test_objectives_from_whole_logits(objective, guard):
    model, rotary = tuned()
    batch = collate(rows(), CPU)
    answers = torch.zeros_like(batch["labels"], dtype=torch.bool)
    answers[0, -9:-1] = True
    nats, divergences = plain(model, rotary, batch)
    counted = batch["labels"] != IGNORED
    inside = (batch["position_ids"] < NATIVE) & ~answers
    weights = torch.where(answers, 3.0, 1.0 if objective == "next-token" else 0.0)
    pulls = guard * inside + {"next-token": 0.0, "distill": ~answers, "preserve": inside}[objective]
    expected = ((weights * nats + pulls * divergences) * counted).sum()
    config = ObjectiveConfig(objective, guard, 3.0, NATIVE, NATIVE // 2)
    found = Objective(model, rotary, config)(**batch, answers=answers)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found[1], (nats * counted).sum(), rtol=1e-5, atol=1e-2)


def test_at_the_base_nothing_is_to_be_learned_inside_the_native_window():
    """Distilling a model of factor 1 into itself: no loss and no gradient."""
    model = tiny_model()
    rotary = attach(model, Start.of(rope_facts(model.config), Rope(window=NATIVE)), "per_pair")
    batch = collate(rows(2, NATIVE), CPU)
    found = Objective(model, rotary, ObjectiveConfig("distill", 0.5, 1.0, NATIVE, NATIVE // 2))(**batch)
    found[0].backward()
    assert abs(found[0].item()) < 1e-3
    assert all(p.grad.abs().max() < 1e-3 for p in rotary.parameters())
