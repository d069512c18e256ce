"""The layer of a YARN_TUNE adapter: it replaces the rotary module and calls the active adapter's `TunableRotary`.

The parameters live in the layer, one dict per adapter, by the last part of their names (`log_factor`, `log_gain`, ...):
the form that PEFT and transformers save and load by themselves. Both may replace tensors by new ones, so the rotary
modules are tied to the registered parameters before each use. Gains act on the queries by hooks, as in `attach`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UserError
from ..models import rotary_site
from ..tunable import (
    FollowingHooks,
    RotaryProxy,
    Start,
    TunableRotary,
    WeightFold,
    adjustments_for,
    move_only,
    observe,
)
from .config import YarnTuneConfig

NUMBERS = "yarn_tune_numbers"
"""Attribute of the layer that holds the parameters, and so part of their names on disk."""


def last_names(rotary: TunableRotary) -> dict[str, str]:
    """The last part of each parameter's name, under which adapters store it -> the whole name."""
    return {name.rpartition(".")[2]: name for name, _ in rotary.named_parameters()}


def place_of(model: PreTrainedModel) -> str:
    """The dotted name of the rotary module, or of the module that replaces it."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, (YarnTuneLayer, RotaryProxy)):
            return name
    parent, attribute = rotary_site(model)
    return next(name for name, module in modules.items() if module is getattr(parent, attribute))


class YarnTuneLayer(nn.Module, BaseTunerLayer):
    """Replaces the stock rotary module; without an active adapter it calls that module."""

    adapter_layer_names = (NUMBERS,)
    other_param_names = ("rotaries",)

    def __init__(self, base_layer: nn.Module, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.yarn_tune_numbers = nn.ModuleDict()
        self.rotaries: dict[str, TunableRotary] = {}
        """By adapter: the module that computes cos and sin. It is not registered; its parameters are registered in
        `yarn_tune_numbers`."""
        self._frozen: dict[str, list[str]] = {}
        """Parameters that are saved and not trained, by adapter."""
        self._observing: list[RemovableHandle] = []
        self._used: set[str] = set()
        # Held in a tuple, so that the model is not registered as a child of this module.
        self._model = (model,)
        self._hooks = FollowingHooks(model)

    def add(self, adapter: str, start: Start, config: YarnTuneConfig) -> None:
        """Add an adapter with its parameters at their start."""
        adjustments = adjustments_for(self._model[0].config.to_dict(), config.rope())
        rotary = TunableRotary(self.base_layer, start, config.frequencies, adjustments)
        named = {last: rotary.get_parameter(name) for last, name in last_names(rotary).items()}
        self.rotaries[adapter] = rotary
        self._frozen[adapter] = [last for last, parameter in named.items() if not parameter.requires_grad]
        self._used.discard(adapter)
        self.yarn_tune_numbers[adapter] = nn.ParameterDict(named)
        self._move_adapter_to_device_of_base_layer(adapter)
        for adjustment in adjustments:
            self._hooks.add(adjustment(), partial(self._values, adjustment.place))

    def rotary(self, adapter: str) -> TunableRotary:
        """The module of one adapter, with the parameters that are registered now."""
        rotary, numbers = self.rotaries[adapter], self.yarn_tune_numbers[adapter]
        for last, name in last_names(rotary).items():
            if numbers[last] is not rotary.get_parameter(name):  # type: ignore[index]
                setattr(rotary.get_submodule(name.rpartition(".")[0]), last, numbers[last])  # type: ignore[index]
        return rotary

    def active(self) -> TunableRotary | None:
        """The active adapter's module; None where the model is the base."""
        own = [name for name in self.active_adapters if name in self.rotaries]
        if self.disable_adapters or not own:
            return None
        rotary = self.rotary(own[0])
        if own[0] not in self._used:  # checks values once, for loaders that do not call `_load_from_state_dict`
            rotary.load_numbers(rotary.numbers())
            self._used.add(own[0])
        return rotary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return cos and sin, as the stock module does."""
        rotary = self.active()
        if rotary is None:
            return self.base_layer(*args, **kwargs)
        self._hooks.follow()
        self._measure(rotary)
        return rotary(*args, **kwargs)

    def _measure(self, rotary: TunableRotary) -> None:
        """In the first training pass, measure the sizes that rates are relative to; the second pass uses them."""
        if self._observing:
            for handle in self._observing:
                handle.remove()
            self._observing = []
            for adjustment in rotary.adjustments:
                if adjustment.unscaled():
                    adjustment.set_scale(_sum_over_processes)
        elif self.training and torch.is_grad_enabled():
            self._observing = observe(self._model[0], rotary)

    def _values(self, place: str) -> WeightFold | None:
        rotary = self.active()
        found = [] if rotary is None else [each() for each in rotary.adjustments if each.place == place]
        return found[0] if found else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active, at most one of this type.

        Raises:
            UserError: if two of them are of this type: their tables cannot be added.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.rotaries]
        if len(own) > 1:
            raise UserError(f"set_adapter: {', '.join(own)} each define a rotary table; only one can be active")
        super().set_adapter(names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` as PEFT does, but keep frozen what the adapter's `frequencies` do not train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for adapter, frozen in self._frozen.items():
            for last in frozen:
                self.yarn_tune_numbers[adapter][last].requires_grad_(False)  # type: ignore[index]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise NotImplementedError: a merge changes the config too, which a loaded model does not read again."""
        raise NotImplementedError("a YARN_TUNE adapter is merged by merge_and_unload, not in place")

    def release(self) -> None:
        """Remove the hooks of numbers that act in the weights."""
        self._hooks.remove()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        numbers = self.yarn_tune_numbers[adapter_name]
        if not any(parameter.is_meta for parameter in numbers.parameters()):
            numbers.to(device or next(self.base_layer.buffers()).device)

    def _apply(self, fn: Any, recurse: bool = True) -> "YarnTuneLayer":
        """Move the numbers with the model, but keep them float32."""
        self.base_layer._apply(fn, recurse)
        self.yarn_tune_numbers._apply(move_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Load the numbers; `TunableRotary.load_numbers` refuses those that do not fit before any is copied."""
        own = f"{prefix}{NUMBERS}."
        found: dict[str, dict[str, Tensor]] = {}
        for key in (key for key in state_dict if key.startswith(own)):
            adapter, _, last = key.removeprefix(own).rpartition(".")
            found.setdefault(adapter, {})[last] = state_dict[key]
        for adapter, numbers in found.items():
            if adapter not in self.rotaries:  # PEFT omits the adapter's name from keys that the adapter does not have
                raise UserError(f"saved numbers have {', '.join(numbers)}, which this adapter's config does not")
            rotary = self.rotary(adapter)
            names = last_names(rotary)
            rotary.load_numbers({names.get(last, last): tensor for last, tensor in numbers.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
