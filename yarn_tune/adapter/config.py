"""The config of an adapter of learned numbers, and its registration as a type of PEFT.

adapter_config.json holds the window, native window, factor, betas and query gains that the numbers are offsets for, the
base they belong to, and the stacks that a merge is served on.
"""

from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Any, TypeVar

from peft import PeftConfig, PeftType, TaskType

from ..errors import UserError
from ..models import RopeFacts
from ..recipe import Rope, parse_rope
from ..tunable import Start

EnumT = TypeVar("EnumT", bound=Enum)


def extended(kind: type[EnumT], name: str) -> EnumT:
    """The member `name` of a string enum, added if it is missing; `PeftType` has no public way to add a member.

    Raises:
        ImportError: if the enums of this Python version do not allow it; only adapters need it.
    """
    try:
        if name not in kind.__members__:
            member = str.__new__(kind, name)  # type: ignore[type-var]
            member._name_, member._value_, member.__objclass__ = name, name, kind  # type: ignore[attr-defined]
            member._sort_order_ = len(kind)  # type: ignore[attr-defined]
            kind._member_names_.append(name)
            kind._member_map_[name] = kind._value2member_map_[name] = member
            type.__setattr__(kind, name, member)
        taken = kind(name) is kind[name] is getattr(kind, name) and kind[name] in list(kind)
    except (AttributeError, KeyError, TypeError, ValueError):
        taken = False
    if not taken:
        raise ImportError(
            f"this Python version cannot add {name} to {kind.__name__}; adapters are tested on 3.11 to 3.13"
        )
    return kind[name]


def layout_keys(facts: RopeFacts) -> dict[str, Any]:
    """The keys of adapter_config.json that identify the bases an adapter belongs to."""
    return {
        "base_model_type": facts.model_type,
        "rope_theta": facts.theta,
        "rotary_dim": facts.dim,
        "base_scaling": facts.scaling.digest() if facts.scaling else "none",
    }


YARN_TUNE: PeftType = extended(PeftType, "YARN_TUNE")

NAMES_OF_0_1_0 = {
    "frequencies": {"yarn": "fixed", "scale": "scale", "ramp": "ramp", "frequency": "per_pair"},
    "query_gains": {"global": "none", "layer": "layer", "head": "head", "spectral": "pair", "phase": "pair_phase"},
}
"""By key: the value that yarn_tune 0.1.0 wrote, under `learn` or `temperature` -> the current value."""


@dataclass
class YarnTuneConfig(PeftConfig):
    """What an adapter's numbers mean; values as in a recipe's `rope` and `export` sections, where they are explained.

    Raises:
        UserError: if values are impossible; the message names all of them.
    """

    window: int = 0
    native: int | None = None
    factor: float | None = None
    frequencies: str = Rope.frequencies
    query_gains: str = Rope.query_gains
    qk_bias: bool = Rope.qk_bias
    beta_fast: float = Rope.beta_fast
    beta_slow: float = Rope.beta_slow
    init: str = Rope.init
    """The search-free method that the numbers are offsets from."""
    stacks: list[str] | None = None
    """Serving stacks that `merge_and_unload` writes the config for."""
    fold: str = "auto"
    as_llama: bool = False
    base_model_type: str | None = None
    """This key and the next two: the rotary layout of the base the numbers belong to; filled in by `start`."""
    rope_theta: float | None = None
    rotary_dim: int | None = None
    base_scaling: str | None = None
    """Digest of the scaling of RoPE in the base's own config, or "none"."""
    target_modules: list[str] | None = None
    """The base's rotary module; filled in when it is attached."""
    learn: InitVar[str | None] = None
    """The key of 0.1.0 for `frequencies`; it is read but not written."""
    temperature: InitVar[str | None] = None
    """The key of 0.1.0 for `query_gains`; it is read but not written."""

    def __post_init__(self, learn: str | None, temperature: str | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for key, old, value in (("frequencies", "learn", learn), ("query_gains", "temperature", temperature)):
            if value is not None:
                names = NAMES_OF_0_1_0[key]
                if value not in names:
                    raise UserError(f"adapter_config.json: {old}: {value!r} is none of {', '.join(names)}")
                setattr(self, key, names[value])
        self.peft_type, self.task_type = YARN_TUNE, TaskType.CAUSAL_LM
        self.rope()

    def rope(self) -> Rope:
        """These values as the section of a recipe."""
        keys = ("window", "native", "factor", "frequencies", "query_gains", "qk_bias", "beta_fast", "beta_slow", "init")
        return parse_rope({key: getattr(self, key) for key in keys}, "YarnTuneConfig")

    def start(self, facts: RopeFacts) -> Start:
        """The start of learning on a base; fills in the keys that describe the base.

        Raises:
            UserError: if the numbers belong to a base of another layout.
        """
        for key, value in layout_keys(facts).items():
            if getattr(self, key) not in (None, value):
                raise UserError(
                    f"adapter_config.json: the numbers were learned on a base with {key} {getattr(self, key)}, this "
                    f"model has {value}; load the adapter on {self.base_model_name_or_path or 'its own base'}"
                )
            setattr(self, key, value)
        start = Start.of(facts, self.rope())
        self.native, self.factor = start.native, start.factor
        return start
