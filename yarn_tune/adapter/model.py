"""The learned numbers as a PEFT adapter: a layer and a tuner of the type `YARN_TUNE`.

Importing this module registers the type; then `get_peft_model`, `PeftModel.from_pretrained`, `model.load_adapter` and
`AutoModelForCausalLM.from_pretrained(adapter)` know it. The layer stands where the stock rotary module was and hands
its calls to the active adapter's `TunableRotary`; gains go on the queries by hooks, as in `tunable.attach`.

The parameters live in the layer, one dict an adapter, by the last part of their names (`log_factor`, `log_gain`, ...):
the form PEFT and transformers save and load by themselves. Both may put new tensors in place of old ones, so the
rotary modules are tied to what is registered before each use.

`merge_and_unload` gives what `export` writes: a stock model with the config of the carrier that serves the numbers, and
with gains folded into its weights. Beside it LoRA is an adapter of its own, of PEFT's type.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models import rope_facts, rotary_site
from ..serving import RopeEncoding, Target, choose_encoding, representable_parameters
from ..tunable import (
    FollowingHooks,
    Learned,
    RotaryProxy,
    Start,
    TunableRotary,
    WeightFold,
    adjustments_for,
    fold_parameters,
    move_only,
)
from .config import YarnTuneConfig

__all__ = ["YarnTuneConfig", "YarnTuneLayer", "YarnTuneModel"]

NUMBERS = "yarn_tune_numbers"
"""Attribute of the layer that holds the parameters, and so part of their names on disk."""


def last_names(rotary: TunableRotary) -> dict[str, str]:
    """The last part of every parameter's name, which is how adapters call it -> the whole name."""
    return {name.rpartition(".")[2]: name for name, _ in rotary.named_parameters()}


def place_of(model: PreTrainedModel) -> str:
    """The dotted name of the rotary module, or of what stands in its place."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, (YarnTuneLayer, RotaryProxy)):
            return name
    parent, attribute = rotary_site(model)
    return next(name for name, module in modules.items() if module is getattr(parent, attribute))


class YarnTuneLayer(nn.Module, BaseTunerLayer):
    """Stands where the stock rotary module was; with no adapter active it is that module."""

    adapter_layer_names = (NUMBERS,)
    other_param_names = ("rotaries",)

    def __init__(self, base_layer: nn.Module, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.yarn_tune_numbers = nn.ModuleDict()
        self.rotaries: dict[str, TunableRotary] = {}
        """The modules that compute; not registered, their parameters are those of `yarn_tune_numbers`."""
        self._used: set[str] = set()
        # In a tuple, so that the model is not registered as a child of this module.
        self._model = (model,)
        self._hooks = FollowingHooks(model)

    def add(self, adapter: str, start: Start, config: YarnTuneConfig) -> None:
        """One more adapter, at its start."""
        adjustments = adjustments_for(self._model[0].config.to_dict(), config.rope())
        rotary = TunableRotary(self.base_layer, start, config.frequencies, adjustments)
        named = {last: rotary.get_parameter(name) for last, name in last_names(rotary).items()}
        self.rotaries[adapter] = rotary
        self._used.discard(adapter)
        self.yarn_tune_numbers[adapter] = nn.ParameterDict(named)
        self._move_adapter_to_device_of_base_layer(adapter)
        for adjustment in adjustments:
            self._hooks.add(adjustment(), partial(self._values, adjustment.place))

    def rotary(self, adapter: str) -> TunableRotary:
        """The module of one adapter, tied to the parameters as they are registered now."""
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
        if own[0] not in self._used:  # once, for loaders that do not ask `_load_from_state_dict`
            rotary.load_numbers(rotary.numbers())
            self._used.add(own[0])
        return rotary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Cos and sin, as the stock module returns them."""
        rotary = self.active()
        if rotary is None:
            return self.base_layer(*args, **kwargs)
        self._hooks.follow()
        return rotary(*args, **kwargs)

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
            raise UserError(f"set_adapter: {', '.join(own)} each give the model a table; only one can be active")
        super().set_adapter(names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's, except for what this `learn` does not learn."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for adapter, rotary in self.rotaries.items():
            if rotary.frequencies == "fixed":
                for name in ("log_scale", "log_temperature"):
                    self.yarn_tune_numbers[adapter][name].requires_grad_(False)  # type: ignore[index]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the numbers are in the config as well as in the weights, and a live model reads its config once."""
        raise NotImplementedError("a YARN_TUNE adapter is merged by merge_and_unload, not in place")

    def release(self) -> None:
        """Remove the hooks of numbers that act in the weights."""
        self._hooks.remove()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        numbers = self.yarn_tune_numbers[adapter_name]
        if not any(parameter.is_meta for parameter in numbers.parameters()):
            numbers.to(device or next(self.base_layer.buffers()).device)

    def _apply(self, fn: Any, recurse: bool = True) -> "YarnTuneLayer":
        """Numbers stay float32, whatever the model becomes."""
        self.base_layer._apply(fn, recurse)
        self.yarn_tune_numbers._apply(move_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Numbers that do not fit are refused, by `TunableRotary.load_numbers`, before any is put in place."""
        own = f"{prefix}{NUMBERS}."
        found: dict[str, dict[str, Tensor]] = {}
        for key in (key for key in state_dict if key.startswith(own)):
            adapter, _, last = key.removeprefix(own).rpartition(".")
            found.setdefault(adapter, {})[last] = state_dict[key]
        for adapter, numbers in found.items():
            if adapter not in self.rotaries:  # PEFT leaves the adapter's name out of what the adapter does not have
                raise UserError(f"saved numbers have {', '.join(numbers)}, which this adapter's config does not")
            rotary = self.rotary(adapter)
            names = last_names(rotary)
            rotary.load_numbers({names.get(last, last): tensor for last, tensor in numbers.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class YarnTuneModel(BaseTuner):
    """PEFT's tuner: puts the layer in place, and takes it out again."""

    prefix = "yarn_tune_"
    tuner_layer_cls = YarnTuneLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # `_prepare_model` fills it in: it takes the model

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        peft_config.start(rope_facts(model.config))
        peft_config.target_modules = [place_of(model)]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, YarnTuneLayer) else YarnTuneLayer(target, self.model)
        layer.add(adapter_name, peft_config.start(rope_facts(self.model.config)), peft_config)
        setattr(parent, target_name, layer)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The stock model that `export` would write, in memory: config, rotary module and, where folded, weights.

        LoRA beside it is merged first.

        Raises:
            UserError: if not exactly one adapter of this type is to be merged, or no config serves its numbers.
        """
        layer = self._layer()
        own = [name for name in adapter_names or self.active_adapters if name in layer.rotaries]
        if len(own) != 1:
            raise UserError(f"merge_and_unload: name one of {', '.join(layer.rotaries)}; found {own}")
        config: Any = self.peft_config[own[0]]
        target = Target.of(self.model.config.to_dict(), config.stacks, config.fold)
        learned = representable_parameters(layer.rotary(own[0]), target)
        served = choose_encoding(learned, target)
        self._take_out()
        super().merge_and_unload(progressbar, safe_merge, adapter_names)
        make_served(self.model, learned, served)
        return self.model  # type: ignore[no-any-return]

    def unload(self) -> nn.Module:
        """The base again."""
        self._take_out()
        return super().unload()

    def _layer(self) -> YarnTuneLayer:
        return next(module for module in self.model.modules() if isinstance(module, YarnTuneLayer))

    def _take_out(self) -> None:
        layer = self._layer()
        parent, _, name = place_of(self.model).rpartition(".")
        setattr(self.model.get_submodule(parent), name, layer.base_layer)
        layer.release()


@torch.no_grad()
def make_served(model: Any, learned: Learned, served: RopeEncoding) -> None:
    """Turn a stock model into what its checkpoint would be: the config as loaded from disk, the weights folded."""
    base = model.config.to_dict()
    if served.folds(learned):
        named = dict(model.named_parameters())
        for name, folded in fold_parameters(model, base, served.fold, learned.folds).items():
            named[name].copy_(folded)
    config = type(model.config).from_dict(served.config(base))
    for key, value in config.to_dict().items():
        if base.get(key) != value:
            setattr(model.config, key, value)
    parent, name = rotary_site(model)
    stock = getattr(parent, name)
    setattr(parent, name, type(stock)(model.config).to(next(stock.buffers()).device))


register_peft_method(name="yarn_tune", config_cls=YarnTuneConfig, model_cls=YarnTuneModel, prefix="yarn_tune_")
