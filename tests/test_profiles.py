"""Learned numbers -> config: what each reader makes of it, over many random settings."""

import random

import pytest
import torch
from conftest import tiny_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from yarn_tune.families import RopeFacts
from yarn_tune.rope import yarn_attention_factor
from yarn_tune.serving.profiles import lengths_for, longest, serve, settle
from yarn_tune.tunable import Learned


def random_learned(rng: random.Random, kind: str) -> Learned:
    head = rng.choice([32, 64, 128, 256])
    partial = rng.choice([1.0, 0.5, 0.25])
    native = rng.choice([128, 256, 1000, 4096, 8192, 131072])
    window = round(native * rng.uniform(1, 32))
    dim = int(head * partial)
    facts = RopeFacts(
        model_type="llama", theta=rng.choice([1e4, 5e5, 1e6]), dim=dim, head_dim=head, native=native,
        partial_rotary_factor=partial,
    )  # fmt: skip
    common = {"facts": facts, "native": native, "window": window, "temperature": rng.uniform(0.16, 4.0)}
    if kind == "frequency":
        return Learned(learn=kind, **common, factors=[rng.uniform(0.5, 64) for _ in range(dim // 2)])
    slow = rng.uniform(0.05, 5)
    return Learned(
        learn=kind,
        original=native,
        **common,
        scale=rng.uniform(1, 64),
        beta_slow=slow,
        beta_fast=slow + rng.uniform(0.1, 195),
    )


def settled(rng: random.Random, kind: str) -> Learned:
    """As everything after training uses it; the table moves by no more than the ratio's resolution."""
    learned = random_learned(rng, kind)
    found = settle(learned)
    original = found.original or 1
    resolution = 1e-6 if kind == "frequency" else 1e-6 + 0.5 / original
    torch.testing.assert_close(found.inv_freq(), learned.inv_freq(), rtol=resolution, atol=0)
    assert settle(found).inv_freq().equal(found.inv_freq())
    return found


def config_of(learned: Learned, keys: dict) -> LlamaConfig:
    return LlamaConfig(
        head_dim=learned.facts.head_dim,
        max_position_embeddings=keys["max_position_embeddings"],
        rope_parameters=dict(keys["rope_parameters"]),
    )


@pytest.mark.parametrize("kind", ["ramp", "frequency"])
def test_transformers_reads_what_was_learned(kind):
    """250 random settings each: frequencies to the bit, the multiplier exactly, no warning but the deliberate one."""
    rng = random.Random(kind)
    for _ in range(250):
        learned = settled(rng, kind)
        served = serve(learned)
        keys = served.config_keys()
        config = config_of(learned, keys)
        rope_type = keys["rope_parameters"]["rope_type"]
        for length in (learned.native // 2, served.max_position_embeddings):
            inv_freq, attention = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)
            torch.testing.assert_close(inv_freq, learned.inv_freq(), rtol=0, atol=0)
            assert attention == pytest.approx(learned.attention_factor, rel=1e-12)
        assert torch.equal(served.inv_freq(learned.facts.dim), inv_freq)


@pytest.mark.parametrize("kind", ["ramp", "frequency"])
def test_the_served_window_is_never_short(kind):
    """vLLM's table has original x factor rows and its window is that product (<= 0.29) or the maximum (>= 0.30)."""
    rng = random.Random(kind)
    for _ in range(500):
        learned = settled(rng, kind)
        served = serve(learned)
        section = served.rope_parameters
        rows = section["original_max_position_embeddings"] * section["factor"]
        assert isinstance(served.max_position_embeddings, int)
        assert served.max_position_embeddings >= learned.window
        if kind == "ramp":
            assert int(rows) >= learned.window
            assert rows > served.max_position_embeddings - 1
            assert served.max_position_embeddings <= longest(learned.window) + learned.scale


def test_both_vllm_readings_of_the_attention_factor():
    """>= 0.30 takes attention_factor; <= 0.29 takes (0.1 ln s + 1) x attn_factor (measured: serving notes)."""
    rng = random.Random(0)
    for _ in range(100):
        learned = settled(rng, "ramp")
        section = serve(learned).rope_parameters
        assert section["attention_factor"] == learned.attention_factor
        old = yarn_attention_factor(section["factor"]) * section["attn_factor"]
        assert old == pytest.approx(learned.attention_factor, rel=1e-12)
        assert section["truncate"] is False


def test_longrope_cannot_depend_on_which_list_is_read():
    section = serve(settled(random.Random(0), "frequency")).rope_parameters
    assert section["short_factor"] == section["long_factor"]
    assert section["attention_factor"] == section["short_mscale"] == section["long_mscale"]
    assert section["original_max_position_embeddings"] > 1


def test_theta_is_wherever_a_reader_looks():
    for kind in ("ramp", "frequency"):
        learned = settled(random.Random(0), kind)
        keys = serve(learned).config_keys()
        assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == learned.facts.theta
        assert keys["rope_scaling"] == keys["rope_parameters"]
        assert "original_max_position_embeddings" not in keys
        overrides = serve(learned).overrides()
        assert overrides["rope_parameters"]["rope_theta"] == learned.facts.theta


def test_the_nominal_factor_keeps_the_native_window():
    assert lengths_for(8.0, 256, 2048) == (256, 2048)
    assert lengths_for(4.0, 8192, 32768) == (8192, 32768)


@pytest.mark.parametrize(("scale", "native", "window"), [(7.83, 4096, 32768), (8.37, 256, 2048), (1.0, 64, 64)])
def test_lengths_carry_the_learned_factor(scale, native, window):
    original, length = lengths_for(scale, native, window)
    assert length >= window
    assert length / original == pytest.approx(scale, rel=1e-4)
    assert length <= longest(window)


def test_partial_rotary_is_written():
    learned = next(
        found
        for seed in range(99)
        if (found := random_learned(random.Random(seed), "ramp")).facts.partial_rotary_factor == 0.25
    )
    assert serve(learned).rope_parameters["partial_rotary_factor"] == 0.25
    assert tiny_config("gpt_neox").rope_parameters["partial_rotary_factor"] == 0.25
