"""The trainable rotary module: the parameters of a run, and the table of frequencies that they give.

The parameters are offsets in log space from search-free YaRN (or the method in `rope.init`), all zero at the start, so
that the start is YaRN to the last bit and weight decay pulls towards it:

    rope.frequencies   offsets (one tensor each, float32)                   numbers
    fixed              none: only numbers in the weights are learned        0
    scale              log s, log t                                         2
    ramp               log s, log beta_fast, log beta_slow, log t           4
    per_pair           log of one factor per rotary pair, log t             d/2 + 1

Tensors have shape (1,) or (d/2,), never (): DeepSpeed and FSDP reject scalars. They stay float32 for any dtype of the
model: a bfloat16 step near log 4 is 0.8% of the factor.

Numbers that act in the weights (`Adjustment`, one per kind) are submodules of this module, so that one module holds all
parameters; LoRA's factors are parameters of the model's adapters, and are referenced here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import BaseModel
from ..recipe import Rope
from ..rope import default_inv_freq
from .kinds import KINDS, adjustments_for
from .lora import PREFIX, LoraFactors, factors_of
from .parameters import Adjustment, Learned, Start
from .replacement import RotaryReplacement, move_only

THETAS = ("abf", "ntk")
"""Methods whose table is that of another theta."""


class TunableRotary(RotaryReplacement):
    """All trainable parameters of a run, in a module that replaces the model's rotary module.

    Args:
        stock: the rotary module to replace.
        start: values at the start.
        frequencies: as in `rope.frequencies`; the module docstring lists the parameters.
        adjustments: parameters that act in the weights.
    """

    def __init__(
        self, stock: nn.Module, start: Start, frequencies: str, adjustments: Sequence[Adjustment] = ()
    ) -> None:
        super().__init__(stock)
        self.start, self.frequencies = start, frequencies
        self._places = [adjustment.place for adjustment in adjustments]
        for adjustment in adjustments:
            self.add_module(adjustment.place, adjustment)
        self.lora = LoraFactors()
        sizes = {
            "fixed": {"log_scale": 1},
            "scale": {"log_scale": 1},
            "ramp": {"log_scale": 1, "log_beta_fast": 1, "log_beta_slow": 1},
            "per_pair": {"log_factor": start.facts.dim // 2},
        }[frequencies]
        self.offsets = nn.ParameterDict({name: nn.Parameter(torch.zeros(n)) for name, n in sizes.items()})
        self.log_temperature = nn.Parameter(torch.zeros(1))
        if frequencies == "fixed":
            self.log_temperature.requires_grad_(False)
            self.offsets.requires_grad_(False)
        self._attention_factor = start.attention_factor
        # Rounding the ramp has no gradient; with these betas the unrounded ramp equals the rounded one.
        self._betas = start.betas()
        self._inv_freq = start.inv_freq()

    @property
    def adjustments(self) -> tuple[Adjustment, ...]:
        """Parameters that act in the weights, in the order in which they are applied."""
        found = [self.get_submodule(place) for place in self._places]
        return tuple(each for each in found if isinstance(each, Adjustment))

    def table(self, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Differentiable table `[d/2]` and multiplier `[1]`; the same at every position."""
        multiplier = self._attention_factor * torch.exp(-0.5 * self.log_temperature)
        if "log_factor" in self.offsets:
            log_factor = self.offsets["log_factor"]
            return self._inv_freq.to(log_factor.device) * torch.exp(-log_factor), multiplier
        if not self.start.ramped:
            return self._inv_freq.to(self.log_temperature.device), multiplier
        # A few scalars: computed in float64 on the CPU, and moved by autograd.
        return self.start.yarn(*self._yarn_numbers()).to(self.log_temperature.device), multiplier

    def _yarn_numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and betas as float64 CPU scalars, differentiable."""
        offsets = {name: offset.cpu().double().reshape(()) for name, offset in self.offsets.items()}
        zero = torch.zeros((), dtype=torch.float64)
        return (
            self.start.factor * torch.exp(offsets["log_scale"]),
            self._betas[0] * torch.exp(offsets.get("log_beta_fast", zero)),
            self._betas[1] * torch.exp(offsets.get("log_beta_slow", zero)),
        )

    def learned(self) -> Learned:
        """The learned numbers in natural units, all of them."""
        return replace(self.sketch(), lora=factors_of(self.numbers()))

    @torch.no_grad()
    def sketch(self) -> Learned:
        """`learned` without the LoRA factors, of which there may be many: cheap enough for every step."""
        temperature = math.exp(self.log_temperature.item()) / self._attention_factor**2
        common: dict[str, Any] = {
            "frequencies": self.frequencies,
            "facts": self.start.facts,
            "native": self.start.native,
            "window": self.start.window,
            "temperature": temperature,
            "folds": tuple(adjustment.exact() for adjustment in self.adjustments),
        }
        if "log_factor" not in self.offsets and self.start.ramped:
            scale, beta_fast, beta_slow = (number.item() for number in self._yarn_numbers())
            common |= {"scale": scale, "original": self.start.original, "beta_fast": beta_fast, "beta_slow": beta_slow}
            if self.start.laid_over is None:
                return Learned(**common)
        base = default_inv_freq(self.start.facts.theta, self.start.facts.dim, torch.float64)
        return Learned(**common, factors=(base / self.table()[0].cpu().double()).tolist())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the name of their kind, in the order of `KINDS`."""
        own: dict[str, list[nn.Parameter]] = {
            "frequency": list(self.offsets.values()),
            "temperature": [self.log_temperature],
            "lora": list(self.lora.parameters.values()),
        }
        for adjustment in self.adjustments:
            own |= adjustment.parameter_groups()
        learned = {kind: [p for p in own.get(kind, ()) if p.requires_grad] for kind in KINDS}
        return {kind: members for kind, members in learned.items() if members}

    def trainable(self) -> list[nn.Parameter]:
        """All trainable parameters."""
        return [parameter for members in self.parameter_groups().values() for parameter in members]

    def count(self) -> dict[str, int]:
        """How many numbers of each kind are learned."""
        groups = self.parameter_groups()
        return {kind: sum(p.numel() for p in members) for kind, members in groups.items()}

    def numbers(self) -> dict[str, Tensor]:
        """Copies of the offsets by name, on the CPU, for saving; `load_numbers` restores them."""
        named = {**dict(self.named_parameters()), **self.lora.parameters}
        return {name: p.detach().cpu().clone() for name, p in named.items()}

    @torch.no_grad()
    def load_numbers(self, numbers: dict[str, Tensor]) -> None:
        """Set the offsets.

        Raises:
            UserError: if names, shapes or values do not fit this parameterisation.
        """
        own = {**dict(self.named_parameters()), **self.lora.matching(numbers)}
        if {n: tuple(t.shape) for n, t in numbers.items()} != {n: tuple(p.shape) for n, p in own.items()}:
            shapes = {n: tuple(t.shape) for n, t in numbers.items()}
            raise UserError(
                f"saved numbers {shapes} do not fit rope.frequencies={self.frequencies!r} on this base model"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in numbers.values()):
            raise UserError("saved numbers contain NaN or Inf; use an earlier checkpoint of the run")
        for name, parameter in own.items():
            parameter.copy_(numbers[name])

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Move s to `scale`, for `scale` and `ramp`."""
        self.offsets["log_scale"].fill_(math.log(scale / self.start.factor))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TunableRotary":
        """Apply a move to another device; ignore a change of dtype."""
        move = move_only(fn)
        self.lora.move(move)
        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]


def is_offset(name: str) -> bool:
    """Whether a saved number is an offset from search-free YaRN, so that zero is YaRN.

    The others are LoRA's A factors (the change of a weight is B A) and measured sizes of activations.
    """
    return not (name.startswith(PREFIX) and name.endswith(".A")) and not name.endswith("_size")


def at_start(base: BaseModel, rope: Rope) -> TunableRotary:
    """The parameters of a `rope` section at their start, without a loaded model: to count, check, or load into.

    Raises:
        UserError: if this base does not support the parameters.
    """
    start = Start.of(base.facts, rope)
    if base.facts.theta_only and (rope.frequencies != "fixed" or rope.method not in THETAS):
        raise UserError(
            f"rope.frequencies, rope.init: {rope.frequencies} and {rope.init}, but a config of {base.facts.model_type} "
            "carries another theta only, and no factors of single pairs; set rope.frequencies to fixed, rope.init to "
            "ntk or abf, and rope.query_gains to layer or pair"
        )
    return TunableRotary(nn.Identity(), start, rope.frequencies, adjustments_for(base.written, rope))
