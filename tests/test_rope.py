"""Every formula against transformers' own, over a grid, at the ends, at identity; gradients by gradcheck."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from yarn_tune import rope

THETAS, HEADS, PARTIALS = (1e4, 5e5, 1e6, 1e7), (32, 64, 128, 256), (1.0, 0.5)
NATIVES, FACTORS = (128, 4096, 131072), (1.0, 3.7, 8.0, 64.0)
BETAS = ((32.0, 1.0), (21.7, 0.63), (200.0, 0.05))

pytestmark = pytest.mark.rope_warnings  # non-integer factors make transformers warn, which is not the point here


def reference(kind: str, theta: float, head: int, partial: float, native: int, factor: float, seq_len=None, **keys):
    """transformers' (inv_freq, attention_factor)."""
    section = {"rope_type": kind, "rope_theta": theta, "factor": factor, "partial_rotary_factor": partial, **keys}
    if kind in ("yarn", "longrope"):
        section["original_max_position_embeddings"] = native
    config = LlamaConfig(head_dim=head, max_position_embeddings=native, rope_parameters=section)
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)


GRID = list(itertools.product(THETAS, HEADS, PARTIALS, NATIVES, FACTORS))


def test_the_grid_is_as_large_as_promised():
    assert len(GRID) * 2 * len(BETAS) >= 200


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("beta_fast", "beta_slow"), BETAS)
def test_yarn_equals_transformers_to_the_last_bit(truncate, beta_fast, beta_slow):
    for theta, head, partial, native, factor in GRID:
        expected, attention = reference(
            "yarn", theta, head, partial, native, factor,
            beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate,
        )  # fmt: skip
        ramp = rope.YarnRamp(native, beta_fast, beta_slow, truncate)
        found = rope.yarn_inv_freq(theta, int(head * partial), factor, ramp)
        assert torch.equal(found, expected), (theta, head, partial, native, factor)
        assert rope.yarn_attention_factor(factor) == attention


def test_abf_moves_the_pair_of_one_turn_to_the_new_window():
    """The table is the unscaled one of transformers at that theta."""
    for theta, head, partial, native, factor in GRID:
        raised = rope.abf_theta(theta, native, factor)
        # The (fractional) pair that makes one turn within the native window makes one within the new window.
        pair = math.log(native / (2 * math.pi)) / math.log(theta)
        assert 2 * math.pi * raised**pair == pytest.approx(factor * native, rel=1e-9)
        assert raised == pytest.approx(theta) if factor == 1 else raised > theta
        if partial == 1.0:
            expected = reference("default", raised, head, partial, native, factor)[0]
            assert torch.equal(rope.default_inv_freq(raised, head), expected)
    with pytest.raises(ValueError, match="more than 6 tokens"):
        rope.abf_theta(1e4, 6, 2.0)


@pytest.mark.parametrize(("head", "clipped"), [(128, 20), (64, 20), (16, 8)])
def test_cope_tapers_the_slowest_pairs(head, clipped):
    """The rule of hrlics/CoPE's rotary module, written out pair by pair."""
    own = rope.default_inv_freq(1e4, head)
    found = rope.cope_inv_freq(own)
    for pair in range(head // 2):
        place = pair - (head // 2 - clipped)
        share = 1.0 if place < 0 else (1 + math.cos(math.pi * place / (clipped - 1))) / 2
        assert found[pair].item() == pytest.approx(own[pair].item() * share, rel=1e-5, abs=1e-12)
    assert found[-1] == 0
    assert torch.equal(own, rope.default_inv_freq(1e4, head))


def test_other_types_equal_transformers_to_the_last_bit():
    for theta, head, partial, native, factor in GRID:
        dim = int(head * partial)
        point = (theta, head, partial, native, factor)
        if partial == 1.0:
            assert torch.equal(rope.default_inv_freq(theta, dim), reference("default", *point)[0])
        assert torch.equal(rope.linear_inv_freq(theta, dim, factor), reference("linear", *point)[0])
        factors = torch.linspace(0.5, 64, dim // 2)
        lists = {"short_factor": factors.tolist(), "long_factor": factors.tolist()}
        expected, attention = reference("longrope", *point, **lists)
        assert torch.equal(rope.longrope_inv_freq(theta, dim, factors), expected)
        assert rope.longrope_attention_factor(factor, native) == attention
        for length in (native // 2, native, 3 * native):
            expected, _ = reference("dynamic", *point, seq_len=length)
            assert torch.equal(rope.dynamic_ntk_inv_freq(theta, dim, factor, length, native), expected)


@pytest.mark.parametrize(("mscale", "all_dim"), [(0.707, 1.0), (1.0, 1.0), (1.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_yarn_attention_factor_with_mscale(mscale, all_dim):
    keys = {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    expected = reference("yarn", 1e4, 64, 1.0, 4096, 8.0, **keys)[1]
    assert rope.yarn_attention_factor(8.0, mscale, all_dim) == expected


def test_both_ends_of_the_ramp():
    """Fast pairs are left alone, slow ones divided by the factor: this kills an inverted ramp."""
    base, found = rope.default_inv_freq(1e4, 128), rope.yarn_inv_freq(1e4, 128, 16.0, rope.YarnRamp(4096))
    low, high = (int(bound) for bound in rope.correction_range(1e4, 128, 4096, 32.0, 1.0, truncate=True))
    assert 0 < low < high < 63
    assert torch.equal(found[: low + 1], base[: low + 1])
    torch.testing.assert_close(found[high:], base[high:] / 16.0, rtol=2e-7, atol=0)
    ratio = base / found
    assert (ratio.diff() >= -1e-5).all()


def test_factor_one_is_identity():
    for theta, head, native in itertools.product(THETAS, HEADS, NATIVES):
        base = rope.default_inv_freq(theta, head)
        torch.testing.assert_close(
            rope.yarn_inv_freq(theta, head, 1.0, rope.YarnRamp(native)), base, rtol=1.2e-7, atol=0
        )
        assert torch.equal(rope.ntk_inv_freq(theta, head, 1.0), base)
        assert torch.equal(rope.dynamic_ntk_inv_freq(theta, head, 4.0, native, native), base)
    assert rope.yarn_attention_factor(1.0) == rope.longrope_attention_factor(1.0, 4096) == 1.0


def test_ntk_stretches_the_slowest_pair_by_the_factor():
    base, found = rope.default_inv_freq(1e4, 128), rope.ntk_inv_freq(1e4, 128, 8.0)
    assert found[0] == base[0]
    assert (base[-1] / found[-1]).item() == pytest.approx(8.0, rel=1e-5)


def test_snapped_betas_give_the_rounded_ramp_unrounded():
    for theta, head, native in itertools.product(THETAS, HEADS, NATIVES):
        betas = rope.snapped_betas(theta, head, native)
        rounded = rope.yarn_inv_freq(theta, head, 8.0, rope.YarnRamp(native))
        unrounded = rope.yarn_inv_freq(theta, head, 8.0, rope.YarnRamp(native, *betas, truncate=False))
        torch.testing.assert_close(unrounded, rounded, rtol=5e-7, atol=0)


def test_gradients_of_yarn_and_longrope():
    def yarn(factor, fast, slow):
        return rope.yarn_inv_freq(1e4, 64, factor, rope.YarnRamp(4096, fast, slow, truncate=False), dtype=torch.float64)

    inputs = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (8.3, 21.7, 0.63)]
    assert torch.autograd.gradcheck(yarn, inputs)
    factors = torch.linspace(1, 9, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: rope.longrope_inv_freq(1e4, 64, f, torch.float64), factors)
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: rope.linear_inv_freq(1e4, 64, s, torch.float64), scale)


def test_correction_dim_is_where_a_pair_makes_that_many_turns():
    index = rope.correction_dim(7.0, 1e4, 128, 4096).item()
    assert 4096 * 1e4 ** (-2 * index / 128) / (2 * math.pi) == pytest.approx(7.0)


@pytest.mark.parametrize("dim", [0, 1, 7])
def test_odd_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match="even"):
        rope.default_inv_freq(1e4, dim)


def test_longrope_wants_one_factor_a_pair():
    with pytest.raises(ValueError, match="32 in all"):
        rope.longrope_inv_freq(1e4, 64, [1.0] * 31)
