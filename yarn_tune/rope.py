"""Rotary position embeddings as pure functions: every formula of this package, and nothing else.

Glossary
    theta                 base of the geometric series of frequencies (HF `rope_theta`)
    d (`dim`)             rotary dimensions of one head; d/2 pairs, of which pair 0 rotates fastest
    native                window the base model was trained with (HF `original_max_position_embeddings`)
    window                window to be served after tuning
    scale s               how far the slow frequencies are stretched (HF `factor`)
    temperature t         attention logits are divided by t
    attention_factor a    the same parameter in Hugging Face configs. HF multiplies **cos and sin** by it, so both
                          q and k are multiplied and logits scale by its **square**: a = 1 / sqrt(t).
    beta_fast, beta_slow  turns within the native window above which a pair is unchanged, and below which it
                          is divided by s; between them YaRN blends linearly in the pair index

Shapes: an inverse frequency table is `[d/2]` in radians per token. Scalars are Python floats or tensors of one
element; the result is differentiable in tensors. Scalar arithmetic is in float64 and the table in float32 (`dtype`),
in the order of operations of `transformers` (v5.23 `modeling_rope_utils.py`), so that the tables agree with it to the
last bit.

Sources: RoPE arXiv:2104.09864; position interpolation arXiv:2306.15595; NTK-aware and dynamic scaling as given
in YaRN, arXiv:2309.00071 (sections 3.1 to 3.4 and appendix B.1); longrope arXiv:2402.13753.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = float | Tensor

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""The YaRN paper's alpha = 1 and beta = 32, under the names serving stacks use."""


def as_scalar(value: Scalar) -> Tensor:
    """A 0-dim float64 tensor; a one-element tensor keeps its place in the autograd graph."""
    if isinstance(value, Tensor):
        return value.double().reshape(())
    return torch.tensor(value, dtype=torch.float64)


def _wavelengths(theta: float, dim: int, dtype: torch.dtype) -> Tensor:
    """theta^(2i/d): radians^-1 per pair, `[d/2]`."""
    if dim < 2 or dim % 2:
        raise ValueError(f"rotary dimensions must be even and at least 2, got {dim}")
    wavelengths: Tensor = theta ** (torch.arange(0, dim, 2).to(dtype) / dim)
    return wavelengths


def default_inv_freq(theta: float, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unscaled RoPE: theta^(-2i/d), `[d/2]`."""
    return 1.0 / _wavelengths(theta, dim, dtype)


def linear_inv_freq(theta: float, dim: int, factor: Scalar, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595, eq. 4)."""
    return default_inv_freq(theta, dim, dtype) / as_scalar(factor)


def proportional_inv_freq(theta: float, dim: int, head_dim: int) -> Tensor:
    """The rotated pairs of a head of which only the first d / 2 rotate (rope_type proportional), float32 `[d/2]`.

    With theta to the power of d / head_dim, it is the table of a head of d dimensions.
    """
    return default_inv_freq(theta, head_dim)[: dim // 2]


def ntk_inv_freq(theta: float, dim: int, factor: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """NTK-aware scaling: theta grows so that the slowest pair is stretched by `factor` (YaRN, section 3.1)."""
    return default_inv_freq(theta * factor ** (dim / (dim - 2)), dim, dtype)


def dynamic_ntk_inv_freq(
    theta: float, dim: int, factor: float, length: int, native: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """NTK-aware scaling that grows with the length read so far (YaRN, section 3.3).

    `length` and `native` are in tokens; up to `native` tokens this is unscaled RoPE.
    """
    growth = (factor * max(length, native) / native) - (factor - 1)
    return default_inv_freq(theta * growth ** (dim / (dim - 2)), dim, dtype)


def abf_theta(theta: float, native: int, factor: float) -> float:
    """The theta for which the pair that makes one turn within `native` tokens makes one within `factor` x `native`.

    The adjusted base frequency (ABF) of arXiv:2309.16039 raises theta only. The amount follows arXiv:2310.05209,
    theorem 1: theta to the power of ln(window / 2 pi) / ln(native / 2 pi).

    Raises:
        ValueError: if no pair can make a turn within `native` tokens.
    """
    if native <= 2 * math.pi:
        raise ValueError(f"a native window of more than 6 tokens is needed, got {native}")
    return float(theta ** (math.log(factor * native / (2 * math.pi)) / math.log(native / (2 * math.pi))))


COPE_PAIRS = 20
"""Number of slowest pairs that CoPE clips, for any head size (hrlics/CoPE, `modeling_cope.py`)."""


LEAST_SHARE = 1e-8
"""Share of its frequency that a clipped pair keeps where a config must hold the table, which has no frequency 0. Over a
million tokens such a pair turns by less than 0.01 radians, whatever its frequency was."""


def cope_inv_freq(inv_freq: Tensor, clipped: int = COPE_PAIRS, least: float = 0.0) -> Tensor:
    """CoPE's soft clipping of a table `[d/2]`: the slowest `clipped` pairs times (1 + cos(x)) / 2, x from 0 to pi.

    The slowest pair gets frequency 0, unless `least` is the least share that a pair keeps. Source: arXiv:2602.05258 and
    its code, hrlics/CoPE.
    """
    count = min(clipped, len(inv_freq))
    taper = 0.5 * (1.0 + torch.cos(torch.linspace(0.0, torch.pi, count, dtype=torch.float32)))
    found = inv_freq.clone()
    found[len(found) - count :] *= taper.clamp(min=least).to(found.dtype)
    return found


def search_free_inv_freq(method: str, theta: float, dim: int, factor: float, native: int) -> Tensor:
    """The table of a method that changes unscaled RoPE, float32 `[d/2]`: linear, ntk, abf or llama3."""
    if method == "linear":
        return linear_inv_freq(theta, dim, factor)
    if method == "ntk":
        return ntk_inv_freq(theta, dim, factor)
    if method == "abf":
        return default_inv_freq(abf_theta(theta, native, factor), dim)
    if method == "llama3":
        return llama3_inv_freq(theta, dim, factor, LLAMA3_LOW, LLAMA3_HIGH, native)
    raise ValueError(f"no method {method!r}")


def correction_dim(turns: Scalar, theta: float, dim: int, native: int) -> Tensor:
    """The (fractional) pair index that makes `turns` full turns within `native` tokens."""
    return dim * torch.log(native / (as_scalar(turns) * 2 * math.pi)) / (2 * math.log(theta))


def correction_range(
    theta: float, dim: int, native: int, beta_fast: Scalar, beta_slow: Scalar, truncate: bool
) -> tuple[Tensor, Tensor]:
    """First and last pair index of YaRN's ramp; `truncate` rounds them outwards, as published."""
    low = correction_dim(beta_fast, theta, dim, native)
    high = correction_dim(beta_slow, theta, dim, native)
    if truncate:
        low, high = torch.floor(low), torch.ceil(high)
    return low.clamp(min=0), high.clamp(max=dim - 1)


def snapped_betas(
    theta: float, dim: int, native: int, beta_fast: float = BETA_FAST, beta_slow: float = BETA_SLOW
) -> tuple[float, float]:
    """Betas whose *unrounded* ramp equals the rounded ramp of the given betas.

    A learned beta needs `truncate: false`, since rounding has no gradient, while search-free YaRN rounds. With these
    betas both give the same table.
    """
    low, high = correction_range(theta, dim, native, beta_fast, beta_slow, truncate=True)
    turns = [native / (2 * math.pi * theta ** (2 * bound / dim)) for bound in (low.item(), high.item())]
    return turns[0], turns[1]


@dataclass(frozen=True)
class YarnRamp:
    """The ramp of YaRN: which pairs it stretches, and between which pairs it blends."""

    native: int
    """Window in tokens within which the betas count turns."""
    beta_fast: Scalar = BETA_FAST
    beta_slow: Scalar = BETA_SLOW
    truncate: bool = True
    """Whether the ends are rounded outwards to whole pairs, as published."""


def yarn_inv_freq(
    theta: float,
    dim: int,
    factor: Scalar,
    ramp: YarnRamp,
    dtype: torch.dtype = torch.float32,
    base: Tensor | None = None,
) -> Tensor:
    """YaRN's "NTK-by-parts" table, `[d/2]` (arXiv:2309.00071, eq. 17 to 21).

    Fast pairs keep their frequency, slow ones are divided by `factor`, which may be any positive number: it is neither
    rounded nor tied to window / native. The attention factor is separate: `yarn_attention_factor`.

    For a model that is already scaled, `base` is its table, `[d/2]`. The ramp then counts the turns that its pairs
    make: each pair gets the share of the unscaled pair with the same frequency. A factor of 1 gives `base` itself.
    """
    low, high = correction_range(theta, dim, ramp.native, ramp.beta_fast, ramp.beta_slow, ramp.truncate)
    width = torch.where(high == low, torch.full_like(high, 0.001), high - low)
    places = torch.arange(dim // 2, dtype=dtype)
    if base is not None:
        places = -dim * torch.log(base.to(dtype)) / (2 * math.log(theta))
    divided = ((places - low) / width).clamp(0, 1)
    if base is not None:
        return base.to(dtype) * (1 + divided * (1 / as_scalar(factor) - 1)).to(dtype)
    kept = 1 - divided
    wavelengths = _wavelengths(theta, dim, dtype)
    return 1.0 / (as_scalar(factor) * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def yarn_gain(factor: float, weight: float = 1.0) -> float:
    """YaRN's multiplier for a factor: 0.1 x weight x ln s + 1, and 1 up to s = 1 (YaRN, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Multiplier of cos and sin where no attention factor is given: 0.1 ln s + 1 (YaRN, eq. 22).

    With both `mscale` values (DeepSeek's form) it is the ratio of the two, each scaling the logarithm.
    """
    if mscale and mscale_all_dim:
        return yarn_gain(factor, mscale) / yarn_gain(factor, mscale_all_dim)
    return yarn_gain(factor)


LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Llama 3.1's frequency factors."""


def llama3_inv_freq(
    theta: float, dim: int, factor: float, low_freq_factor: float, high_freq_factor: float, native: int
) -> Tensor:
    """Llama 3.1's table, float32 `[d/2]`: slow pairs divided by `factor`, fast ones kept, a blend in between.

    Source: transformers v5.23 `modeling_rope_utils.py`, `_compute_llama3_parameters`.
    """
    inv_freq = default_inv_freq(theta, dim)
    wavelength = 2 * math.pi / inv_freq
    kept = (native / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = (1 - kept) * inv_freq / factor + kept * inv_freq
    slow = torch.where(wavelength > native / low_freq_factor, inv_freq / factor, blend)
    return torch.where(wavelength < native / high_freq_factor, inv_freq, slow)


def longrope_inv_freq(
    theta: float, dim: int, factors: Tensor | list[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """One divisor per pair: theta^(-2i/d) / factors[i]; `factors` is `[d/2]`."""
    divisors = factors if isinstance(factors, Tensor) else torch.tensor(factors, dtype=dtype)
    if divisors.shape != (dim // 2,):
        raise ValueError(f"longrope needs one factor per pair, {dim // 2} in all, got {tuple(divisors.shape)}")
    return 1.0 / (divisors * _wavelengths(theta, dim, dtype))


def longrope_attention_factor(factor: float, native: int) -> float:
    """Multiplier of cos and sin where a longrope config gives no attention factor."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(native))
