"""The GPU benchmark's parts that a CPU can check; `bash benchmarks/gpu.sh --smoke` runs all of them in CI."""

import sys
from pathlib import Path

import torch
from tiny import NATIVE, VOCABULARY, tiny_model
from yarn_tune.models import rope_facts
from yarn_tune.recipe import Rope
from yarn_tune.training import Objective, ObjectiveConfig
from yarn_tune.tunable import Start, adjustments_for, attach

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import handwritten, report
from gpu.context import Results


def test_the_hand_written_loop_is_the_same_mathematics():
    """Loss and gradients of both, at the same learned values away from the start."""
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (1, NATIVE + 1))
    plain, ours = tiny_model("llama"), tiny_model("llama")
    rope = Rope(window=NATIVE, query_gains="pair_phase")  # nothing to extend: YaRN is the base
    rotary = attach(
        ours, Start.of(rope_facts(ours.config), rope), "per_pair", adjustments_for(ours.config.to_dict(), rope)
    )
    hand = handwritten.prepare(plain)
    named = {name.rpartition(".")[2]: parameter for name, parameter in rotary.named_parameters()}
    with torch.no_grad():
        for name, parameter in hand.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
            named[name].copy_(parameter)
    expected = Objective(ours, rotary, ObjectiveConfig())(ids[:, :-1], torch.arange(NATIVE)[None], ids[:, 1:])[0]
    found = handwritten.loss(plain, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    expected.backward()
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_report_says_what_was_skipped_and_what_failed():
    parts = {
        "environment": {"card": "a card", "torch": "2", "smoke": False, "wall_seconds": 1},
        "demo": {"failed": "ValueError: no", "wall_seconds": 1},
        "cost of a step": {
            "cells": {"forward, 8192": {"seconds": 1.0}, "kept, 8192": {"seconds": 2.4}},
            "ratios": {"kept, 8192": {"forwards": 2.4}}, "wall_seconds": 1,
        },
        "planned memory": {"skipped": "it needs a GPU", "wall_seconds": 0},
    }  # fmt: skip
    text = report.text(Results(parts))
    assert "Failed: ValueError: no" in text
    assert "Skipped: it needs a GPU." in text
    assert "takes 2.4 forwards at 8192 tokens" in text
    assert "| kept | 2.400 s, 2.4x |" in text
