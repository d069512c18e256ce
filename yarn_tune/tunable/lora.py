"""LoRA: low-rank changes of the weights, trained together with the other learned numbers and merged at export.

PEFT injects the adapters. Only their factors leave this module, so that evaluation and export need no PEFT model: a
weight W becomes W + B A, and other values are folded into that sum.

Shapes: A is `[rank, in]`, B is `[out, rank]`; a change is `[out, in]`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..models import WRAPPERS, check_plain, empty_model, language_tower, save_weights
from ..recipe import Lora

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of a weight -> (B, A), float32."""

PREFIX = "lora."
"""First part of the factors' names among the saved numbers."""


class LoraFactors:
    """The trainable factors of a run; empty where it has no LoRA.

    The factors are parameters of the model's adapters. Without a model, loaded numbers are kept as they are.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter] | None = None, adapters: list[nn.Module] | None = None
    ) -> None:
        self.parameters = parameters or {}
        """Parameters by name, `lora.<weight>.A` and `lora.<weight>.B`."""
        self._adapters = adapters or []

    def matching(self, numbers: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """The parameters to load saved numbers into; without a model, they are made from these numbers."""
        if not self._adapters:
            self.parameters = {n: nn.Parameter(t.clone()) for n, t in numbers.items() if n.startswith(PREFIX)}
        return self.parameters

    def switch(self, on: bool) -> None:
        """Enable or disable the adapters in the forward pass; their parameters stay trainable."""
        for module in self._adapters:
            module._disable_adapters = not on  # type: ignore[assignment]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the factors by `fn`, since sharding moves only the weights of the model."""
        for factor in self.parameters.values():
            factor.data = fn(factor.data)


@dataclass(frozen=True)
class LoraSize:
    """Size of the adapters of a `lora` section in one model."""

    numbers: int
    """Trainable numbers."""
    copied: int
    """Numbers per token kept for the gradients of A, over all layers, where each module copies its input to float32."""
    shared: int
    """`copied` of a float32 model, where modules with the same input keep it once."""


NO_LORA = LoraSize(0, 0, 0)


def lora_config(lora: Lora, targets: Iterable[str] = ()) -> LoraConfig:
    """The section as a PEFT config; `targets` are names of modules, in place of the section's."""
    # With alpha = rank the change is B A, and only the learning rate sets how fast it grows.
    modules = list(targets) or lora.targets
    return LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=modules, lora_dropout=0.0)


def target_modules(model: PreTrainedModel, lora: Lora) -> dict[str, nn.Linear]:
    """The modules to add adapters to, by name; as in PEFT, a target is a module's name or the last parts of it.

    In a wrapper only modules of the language model are found: those of a vision tower may have the same last names.

    Raises:
        UserError: if a target is in no layer of the model, or is not a linear module.
    """
    output, found, missing = model.get_output_embeddings(), dict[str, nn.Linear](), []
    inside = set(language_tower(model).modules())
    modules = {n: m for n, m in model.named_modules() if m in inside}
    for target in lora.targets:
        named = {n: m for n, m in modules.items() if n == target or n.endswith(f".{target}")}
        if not named:
            missing.append(target)
        for name, module in named.items():
            if module is output or not isinstance(module, nn.Linear):
                raise UserError(f"lora.targets: {name} is not a linear module inside the layers; leave it out")
            found[name] = module
    if missing:
        linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and m is not output]
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"lora.targets: this model has no {', '.join(missing)}; it has {', '.join(kinds)}")
    return found


def lora_size(config: PreTrainedConfig, lora: Lora | None) -> LoraSize:
    """Size of a section's adapters in the model that a config describes; raises as `target_modules` does."""
    if lora is None:
        return NO_LORA
    modules = target_modules(empty_model(config), lora)
    read = [m.in_features for m in modules.values()]
    # One tensor per parent and width: queries, keys and values have the same input, and the input of the output
    # projection is kept by attention anyway.
    tensors = {(name.rpartition(".")[0], m.in_features) for name, m in modules.items()}
    numbers = lora.rank * (sum(read) + sum(m.out_features for m in modules.values()))
    return LoraSize(numbers, sum(read), sum(width for _, width in tensors))


def add_lora(model: PreTrainedModel, lora: Lora) -> LoraFactors:
    """Add adapters to the target modules; they start with a change of zero, and are float32 for any dtype of the model.

    Raises:
        UserError: as `target_modules` does.
    """
    inject_adapter_in_model(lora_config(lora, target_modules(model, lora)), model)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        for factor in ("A", "B"):
            ending = f".lora_{factor}.default.weight"
            if name.endswith(ending):
                parameter.data = parameter.data.float()
                found[f"{PREFIX}{name.removesuffix(ending)}.weight.{factor}"] = parameter
    return LoraFactors(found, [module for module in model.modules() if isinstance(module, LoraLayer)])


def remove_lora(model: PreTrainedModel) -> None:
    """Restore the modules that the adapters wrap."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.get_base_layer())


def factors_of(numbers: dict[str, Tensor]) -> Factors | None:
    """The factors among saved numbers; None if there are none."""
    weights = sorted({name.removeprefix(PREFIX)[:-2] for name in numbers if name.startswith(PREFIX)})
    return {w: (numbers[f"{PREFIX}{w}.B"], numbers[f"{PREFIX}{w}.A"]) for w in weights} or None


def merged(weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """W + B A, rounded once to the dtype of W."""
    b, a = (factor.to(weight.device, torch.float32) for factor in factors)
    return (weight.float() + b @ a).to(weight.dtype)


@contextmanager
def with_lora(model: PreTrainedModel, factors: Factors | None) -> Iterator[None]:
    """Within the context, the model has the merged weights; afterwards the original ones are restored exactly."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in factors or {}}
    try:
        with torch.no_grad():
            for name, pair in (factors or {}).items():
                parameters[name].copy_(merged(parameters[name], pair))
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)


def merge_checkpoint(folder: Path, config: dict[str, Any], factors: Factors) -> None:
    """Merge the factors into the checkpoint's weight files, in place.

    Args:
        folder: the folder of the checkpoint.
        config: its config.json.
        factors: factors by the names of weights in memory.

    Raises:
        UserError: if the checkpoint lacks one of the weights, or a file cannot be written.
    """
    row, missing = WRAPPERS.get(config["model_type"]), set(factors)
    saved_as = {saved: name for name in factors for saved in (row.saved_names(name) if row else (name,))}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()) & set(saved_as), file.metadata()
        if names:
            weights = load_file(path)
            check_plain({name: weights[name] for name in names})
            weights |= {name: merged(weights[name], factors[saved_as[name]]) for name in names}
            save_weights(weights, path, metadata)
        missing -= {saved_as[name] for name in names}
    if missing:
        raise UserError(f"lora: {folder} has no weights {', '.join(sorted(missing)[:3])}, which were trained")
