"""The trainable rotary module: a few learned numbers in, cos and sin out, for every layout of `transformers`.

What is learned are offsets in log space from search-free YaRN, all zero at the start, so that the start is
YaRN to the last bit and weight decay pulls towards it:

    learn       offsets (each its own tensor, float32)                   numbers
    yarn        none: gains and LoRA alone are learned                   0
    scale       log s, log t                                             2
    ramp        log s, log beta_fast, log beta_slow, log t               4
    frequency   log of one factor per rotary pair, log t                 d/2 + 1

Tensors have shape (1,) or (d/2,), never (): DeepSpeed and FSDP refuse scalars. They stay float32 whatever
happens to the model: a bfloat16 step near log 4 is 0.8% of the factor.

Temperatures per layer, head and pair commute with the rotation, so they are applied to q, by hooks (`gains.py`); their
numbers are kept here, so that everything learned is in one module.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models import BaseModel, query_site
from ..recipe import Lora, Rope
from ..rope import default_inv_freq
from .lora import PREFIX, add_lora, factors_of, remove_lora, switch_lora
from .parameters import Learned, Start
from .query_gains import Gains, gains_for, scale_queries
from .replacement import FixedRotary, RotaryProxy, RotaryReplacement, move_only, swap


class TunableRotary(RotaryReplacement):
    """The learned numbers. See the module docstring for what is learned under each `learn`."""

    def __init__(self, stock: nn.Module, start: Start, frequencies: str, gains: Gains | None = None) -> None:
        super().__init__(stock)
        self.start, self.frequencies, self.gains = start, frequencies, gains
        self.lora: dict[str, nn.Parameter] = {}
        """LoRA factors by name; they are parameters of the model's adapters, not of this module."""
        self.adapters: list[nn.Module] = []
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
        # Rounding the ramp has no gradient; from these betas the unrounded ramp is the rounded one.
        self._betas = start.betas()
        self._inv_freq = start.inv_freq()

    def table(self, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Differentiable table `[d/2]` and multiplier `[1]`; the same at every position."""
        multiplier = self._attention_factor * torch.exp(-0.5 * self.log_temperature)
        if "log_factor" in self.offsets:
            log_factor = self.offsets["log_factor"]
            return self._inv_freq.to(log_factor.device) * torch.exp(-log_factor), multiplier
        # A few scalars: computed on the CPU, where the formula keeps float64, and moved by autograd.
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
        """`learned` without the LoRA factors, which may be many: cheap enough for every step."""
        temperature = math.exp(self.log_temperature.item()) / self._attention_factor**2
        common: dict[str, Any] = {
            "frequencies": self.frequencies,
            "facts": self.start.facts,
            "native": self.start.native,
            "window": self.start.window,
            "temperature": temperature,
            "gains": None if self.gains is None else self.gains.exact(),
        }
        if "log_factor" not in self.offsets:
            scale, beta_fast, beta_slow = (number.item() for number in self._yarn_numbers())
            common |= {"scale": scale, "original": self.start.original, "beta_fast": beta_fast, "beta_slow": beta_slow}
            if self.start.laid_over is None:
                return Learned(**common)
        base = default_inv_freq(self.start.facts.theta, self.start.facts.dim, torch.float64)
        return Learned(**common, factors=(base / self.table()[0].cpu().double()).tolist())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, for their learning rates."""
        own = {"frequency": list(self.offsets.values()), "temperature": [self.log_temperature]}
        own |= {} if self.gains is None else self.gains.parameter_groups()
        own |= {"lora": list(self.lora.values())}
        learned = {kind: [p for p in members if p.requires_grad] for kind, members in own.items()}
        return {kind: members for kind, members in learned.items() if members}

    def trainable(self) -> list[nn.Parameter]:
        """Everything that is learned."""
        return [parameter for members in self.parameter_groups().values() for parameter in members]

    def count(self) -> dict[str, int]:
        """How many numbers of each kind are learned."""
        groups = self.parameter_groups()
        return {kind: sum(p.numel() for p in members) for kind, members in groups.items()}

    def numbers(self) -> dict[str, Tensor]:
        """Copies of the offsets by name, on the CPU, for saving; `load_numbers` takes them back."""
        named = {**dict(self.named_parameters()), **self.lora}
        return {name: p.detach().cpu().clone() for name, p in named.items()}

    @torch.no_grad()
    def load_numbers(self, numbers: dict[str, Tensor]) -> None:
        """Set the offsets.

        Raises:
            UserError: if names, shapes or values do not fit this parameterisation.
        """
        if not self.adapters:  # without a model, the factors are kept as they come
            self.lora = {name: nn.Parameter(t) for name, t in numbers.items() if name.startswith(PREFIX)}
        own = {**dict(self.named_parameters()), **self.lora}
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
        """Follow a move to another device; ignore a change of dtype."""
        move = move_only(fn)
        for factor in self.lora.values():  # where sharding moves the model's own weights, it leaves these behind
            factor.data = move(factor.data)
        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]


def at_start(base: BaseModel, rope: Rope) -> TunableRotary:
    """The parameters of a `rope` section at their start, without a loaded model: to count, check, or load into.

    Raises:
        UserError: if this base cannot carry what is to be learned.
    """
    start = Start.of(base.facts, rope)
    return TunableRotary(nn.Identity(), start, rope.frequencies, gains_for(base.written, rope.query_gains))


def attach(
    model: PreTrainedModel, start: Start, frequencies: str, gains: Gains | None = None, lora: Lora | None = None
) -> TunableRotary:
    """Freeze the model, swap its rotary module for a trainable one; gains go on its queries, LoRA beside its weights.

    The model must be loaded in its final dtype already, and starts as search-free YaRN. `detach` undoes it.
    """
    rotary = swap(model, lambda stock: TunableRotary(stock, start, frequencies, gains).to(model.device))
    if lora is not None:
        rotary.lora, rotary.adapters = add_lora(model, lora)
    if gains is not None:
        rotary.handles = scale_queries(model, gains.site, lambda: None if rotary.bypassed else gains())
    return rotary


def attach_fixed(
    model: PreTrainedModel, table_of: Callable[[int], tuple[Tensor, float]], gains: Tensor | None = None
) -> FixedRotary:
    """Swap the rotary module for one with a given table, and multiply queries by `gains`; see `FixedRotary`."""
    rotary = swap(model, lambda stock: FixedRotary(stock, table_of))
    if gains is not None:
        double = model.dtype == torch.float64
        real, turned = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
        placed = gains.to(turned if gains.is_complex() else real).to(model.device)  # not every device has doubles
        rotary.handles = scale_queries(model, query_site(model.config.to_dict()), lambda: placed)
    return rotary


@contextmanager
def base_model_active(rotary: TunableRotary) -> Iterator[None]:
    """For a while, the model it is attached to computes what the base does."""
    rotary.bypassed = True
    switch_lora(rotary.adapters, False)
    try:
        yield
    finally:
        rotary.bypassed = False
        switch_lora(rotary.adapters, True)


def detach(model: PreTrainedModel) -> None:
    """Put the stock rotary module back. What was learned is in the module `attach` returned."""
    remove_lora(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RotaryProxy):
                for handle in child.rotary.handles:
                    handle.remove()
                setattr(parent, name, child.rotary.stock)
