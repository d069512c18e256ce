"""RoPE scaling in the config of a base (Llama 3.1, YaRN, longrope, linear).

Training on such a base starts from its own table, with search-free YaRN applied on top for the factor by which the new
window exceeds the base's. The table comes from transformers' own functions, so it equals the base's bit for bit.

Shapes: tables are inverse frequencies, float32 `[d/2]`, kept as tuples so that they can be compared and hashed.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UserError
from ..rope import BETA_FAST, BETA_SLOW

CONTINUED = ("llama3", "yarn", "longrope", "linear")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Parameters of the YaRN in a base's config; a longer window changes only the factor."""

    factor: float
    original: int
    """Window in tokens within which the betas count rotations."""
    beta_fast: float
    beta_slow: float
    truncate: bool

    @property
    def reach(self) -> int:
        """The window that this YaRN extends to."""
        return round(self.factor * self.original)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The table and multiplier in a base's config."""

    rope_type: str
    inv_freq: tuple[float, ...]
    """Inverse frequencies for prompts of more than `above` tokens."""
    attention_factor: float
    short_inv_freq: tuple[float, ...] | None = None
    """Inverse frequencies for shorter prompts, where they differ (longrope)."""
    above: int = 0
    ramp: Ramp | None = None

    def table(self, length: int) -> tuple[Tensor, float]:
        """Inverse frequencies and multiplier of the base for a prompt of `length` tokens."""
        short = self.short_inv_freq is not None and length <= self.above
        return torch.tensor(self.short_inv_freq if short else self.inv_freq), self.attention_factor

    def digest(self) -> str:
        """A short identifier of the table; numbers learned with one table do not fit another."""
        content = repr((self.inv_freq, self.short_inv_freq, self.attention_factor)).encode()
        return f"{self.rope_type} {hashlib.sha256(content).hexdigest()[:12]}"


def scaling_of(config: PreTrainedConfig, section: dict[str, Any], layer_kind: str) -> Scaling | None:
    """The scaling in a base's rope section; None where it is plain RoPE.

    Raises:
        UserError: if it cannot be continued, with the reason.
    """
    kind = section["rope_type"]
    if kind == "default":
        return None
    if kind not in CONTINUED:
        reason = "depends on the prompt length" if kind == "dynamic" else "is not supported"
        raise UserError(
            f"base.model: its config has rope_type {kind!r}, which {reason}; supported types: {', '.join(CONTINUED)}. "
            "Remove the scaling from a copy of its config.json to start from plain RoPE"
        )
    compute = ROPE_INIT_FUNCTIONS[kind]
    above = int(section.get("original_max_position_embeddings") or config.max_position_embeddings)
    options = {"layer_type": layer_kind} if layer_kind else {}
    long, attention_factor = compute(config, torch.device("cpu"), seq_len=above + 1, **options)
    short = None
    if kind == "longrope":
        table, _ = compute(config, torch.device("cpu"), seq_len=above, **options)
        short = None if table.equal(long) else tuple(table.tolist())
    return Scaling(
        rope_type=kind,
        inv_freq=tuple(long.tolist()),
        attention_factor=float(attention_factor),
        short_inv_freq=short,
        above=above if short else 0,
        ramp=_ramp(section, above, config.max_position_embeddings) if kind == "yarn" else None,
    )


def _ramp(section: dict[str, Any], original: int, longest: int) -> Ramp:
    factor = section.get("factor")
    return Ramp(
        factor=float(longest / original if factor is None else factor),
        original=original,
        beta_fast=float(section.get("beta_fast") or BETA_FAST),
        beta_slow=float(section.get("beta_slow") or BETA_SLOW),
        truncate=bool(section.get("truncate", True)),
    )
