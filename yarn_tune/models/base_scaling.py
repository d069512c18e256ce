"""What a base's own config already does to its rotary frequencies (Llama 3.1, YaRN, longrope, linear).

Such a base is continued from what it has: its own table is the identity, and search-free YaRN is laid over it for what
the window grows beyond the one it reads. The numbers come from transformers' own functions, so that identity is what
the base computes, to the last bit.

Shapes: tables are inverse frequencies, float32 `[d/2]`, kept as tuples so that they can be compared and hashed.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterator
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
    """How a base that ships YaRN computes its table: only the factor grows when it is continued."""

    factor: float
    original: int
    """Tokens that the betas count turns in."""
    beta_fast: float
    beta_slow: float
    truncate: bool

    @property
    def reach(self) -> int:
        """The window it extends to."""
        return round(self.factor * self.original)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The table and multiplier a base ships."""

    rope_type: str
    inv_freq: tuple[float, ...]
    """Of prompts of more than `above` tokens."""
    attention_factor: float
    short_inv_freq: tuple[float, ...] | None = None
    """Of shorter prompts, where those differ (longrope)."""
    above: int = 0
    ramp: Ramp | None = None

    def table(self, length: int) -> tuple[Tensor, float]:
        """What the base computes with, reading `length` tokens."""
        short = self.short_inv_freq is not None and length <= self.above
        return torch.tensor(self.short_inv_freq if short else self.inv_freq), self.attention_factor

    def digest(self) -> str:
        """A short name of the table: numbers learned over one do not fit another."""
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
        reason = "changes with the length read" if kind == "dynamic" else "is not known here"
        raise UserError(
            f"base.model: its config carries rope_type {kind!r}, which {reason}; continued are {', '.join(CONTINUED)}. "
            "Take the scaling out of a copy of its config.json to start from plain RoPE"
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


SECTIONS = ("rope_scaling", "rope_parameters")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which wrappers keep the config of their language model."""
WHOLE = ("max_position_embeddings", "hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim",
         "original_max_position_embeddings", "qk_rope_head_dim", "sliding_window", "n_positions", "max_seq_len",
         "seq_length", "model_max_length", "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
REQUIRED = ("max_position_embeddings", "hidden_size", "num_attention_heads", "num_hidden_layers")
"""Keys that may be left out, where the config class has a default, but must not be null."""
NUMBERS = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")
IN_SECTION = ("factor", "original_max_position_embeddings", "attention_factor", "attn_factor", "beta_fast",
              "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "rope_theta",
              "partial_rotary_factor", "short_mscale", "long_mscale", "alpha", "extrapolation_factor",
              "llama_4_scaling_beta", "max_trained_positions")  # fmt: skip
"""Keys of a rope section that hold numbers."""
POSITIVE = {"factor", "rope_theta", "rotary_emb_base", "original_max_position_embeddings", "max_position_embeddings",
            "hidden_size", "num_attention_heads", "alpha"}  # fmt: skip
OTHER_IN_SECTION = ("rope_type", "type", "short_factor", "long_factor", "truncate", "mrope_section",
                    "mrope_interleaved", "apply_yarn_scaling", "finetuned", "dynamic", "rope_dim")  # fmt: skip
SCALED_TYPES = {"yarn", "linear", "dynamic", "longrope", "su", "llama3", "ntk", "deepseek_yarn"}


def check_types(config: dict[str, Any]) -> None:
    """Refuse values of the wrong type under the keys that the rotary embeddings are computed from.

    Raises:
        UserError: naming every such key, its value and what to write.
    """
    faults = list(_faults(config, ""))
    if faults:
        raise UserError("config.json: " + "; ".join(faults))


def _faults(config: dict[str, Any], path: str) -> Iterator[str]:
    for key in (*WHOLE, *NUMBERS):
        if key in config:
            yield from _number_faults(path + key, config[key], whole=key in WHOLE, null=key not in REQUIRED)
    for key in SECTIONS:
        section = config.get(key)
        if section is not None and section is not False and not isinstance(section, dict):
            yield f'{path}{key} is {_shown(section)}, where an object is needed; write it as {{"rope_type": ..., ...}}'
        elif isinstance(section, dict):
            yield from _section_faults(f"{path}{key}.", section)
    for key in NESTED:
        if isinstance(config.get(key), dict):
            yield from _faults(config[key], f"{path}{key}.")


def _section_faults(path: str, section: dict[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _section_faults(f"{path}{key}.", value)
        elif key in IN_SECTION:
            yield from _number_faults(path + key, value, whole=False, null=True)
        elif key in ("rope_type", "type") and not isinstance(value, str | None):
            yield f'{path}{key} is {_shown(value)}, where a name is needed, such as "yarn"'
        elif key in ("short_factor", "long_factor"):
            wrong = not isinstance(value, list) or any(
                isinstance(v, bool) or not isinstance(v, int | float) for v in value
            )
            if wrong:
                yield f"{path}{key} is {_shown(value)}, where a list of numbers is needed, one per pair"
        elif key == "truncate" and not isinstance(value, bool | None):
            yield f"{path}{key} is {_shown(value)}; write true or false without quotes"


def _number_faults(path: str, value: Any, whole: bool, null: bool) -> Iterator[str]:
    needed = "a whole number" if whole else "a number"
    if value is None:
        if not null:
            yield f"{path} is null, where {needed} is needed"
        return
    if isinstance(value, str):
        yield f"{path} is {_shown(value)}, a string, where {needed} is needed{_unquoted(value, whole)}"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{path} is {_shown(value)}, where {needed} is needed"
    elif not math.isfinite(value):
        yield f"{path} is {value}, where {needed} is needed"
    elif whole and isinstance(value, float) and not path.endswith("original_max_position_embeddings"):
        hint = f"; write {int(value)}" if value == int(value) else ""
        yield f"{path} is {value}, where a whole number is needed: transformers 5 does not load it{hint}"
    elif value <= 0 and path.rsplit(".", 1)[-1] in POSITIVE:
        yield f"{path} is {value}, where a number above 0 is needed"


def _unquoted(value: str, whole: bool) -> str:
    try:
        number = float(value)
    except ValueError:
        return ""
    return f"; write {int(number) if whole and number == int(number) else value.strip()} without quotes"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def spelling_mistakes(config: dict[str, Any], text: dict[str, Any]) -> list[str]:
    """Keys of a config.json, and of its language model, that look like rope keys and that no stack reads, in words."""
    found = {**dict(_misspelt(config)), **dict(_misspelt(text))}
    said = [
        f"{key!r} is a key that no stack reads, so what it holds is ignored; {meant!r} may be meant"
        for key, meant in found.items()
    ]
    for name in SECTIONS:
        section = text.get(name) or {}
        for part in (section, *(value for value in section.values() if isinstance(value, dict))):
            said += [
                f"{key!r} in {name} is a key that no stack reads, so it is ignored; {meant!r} may be meant"
                for key, meant in _misspelt_in_section(part)
            ]
    return said


def _misspelt(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, the key that may be meant) of keys that look like rope keys and that no stack reads."""
    found = []
    known = [*SECTIONS, "rope_theta", "max_position_embeddings", "original_max_position_embeddings"]
    for key, value in config.items():
        if key in (*NUMBERS, *SECTIONS, *WHOLE):
            continue
        close = _closest(key, known)
        kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
        scaled = isinstance(kind, str) and kind.lower() in SCALED_TYPES
        if close in SECTIONS and not isinstance(value, dict | list | str):
            continue
        if close is not None or scaled:
            found.append((key, close or "rope_scaling"))
    return found


def _misspelt_in_section(section: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for keys of a rope section."""
    known = [*IN_SECTION, *OTHER_IN_SECTION]
    pairs = [(key, _closest(key, known)) for key in section if key not in known]
    return [(key, close) for key, close in pairs if close is not None]


def _closest(key: str, known: list[str]) -> str | None:
    """The known key of which this is another spelling."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "").replace("-", "").replace(" ", "")

    names = {plain(name): name for name in known}
    match = difflib.get_close_matches(plain(key), list(names), n=1, cutoff=0.88)
    return names[match[0]] if match else None
