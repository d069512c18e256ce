"""LoRA beside the ladder: low-rank changes of the weights, trained with the learned numbers and merged at export.

peft puts the adapters in; what leaves this module are the factors alone, so that measuring and exporting need no peft
model: a weight W becomes W + B A, which is then folded like any other.

Shapes: A is `[rank, in]`, B is `[out, rank]`; a change is `[out, in]`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..models import save_weights
from ..recipe import Lora

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of a weight -> (B, A), float32."""

PREFIX = "lora."
"""Of the factors' names among the saved numbers."""


@dataclass(frozen=True)
class LoraSize:
    """What the section comes to in one model."""

    numbers: int
    """Learned."""
    copied: int
    """Numbers a token kept for the gradients of A, over all layers, where each module copies its input to float32."""
    shared: int
    """The same in a model of float32, where modules that read one tensor keep that."""


NO_LORA = LoraSize(0, 0, 0)


def lora_config(lora: Lora) -> LoraConfig:
    """The section as peft reads it."""
    # alpha = rank: the change is B A, and the learning rate alone says how fast it grows.
    return LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=lora.targets, lora_dropout=0.0)


def target_modules(model: PreTrainedModel, lora: Lora) -> dict[str, nn.Linear]:
    """The modules that get adapters, by name; peft finds the same: a target is a module's name, or its last parts.

    Raises:
        UserError: if a target is in no layer of the model, or something else than a linear module.
    """
    output, found, missing = model.get_output_embeddings(), dict[str, nn.Linear](), []
    for target in lora.targets:
        named = {n: m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")}
        if not named:
            missing.append(target)
        for name, module in named.items():
            if module is output or not isinstance(module, nn.Linear):
                raise UserError(f"lora.targets: {name} is no linear module inside the layers; leave it out")
            found[name] = module
    if missing:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"lora.targets: {', '.join(missing)}: not in this model; it has {', '.join(kinds)}")
    return found


def lora_size(config: PreTrainedConfig, lora: Lora | None) -> LoraSize:
    """Of the section in the model that a config describes; raises as `target_modules` does."""
    if lora is None:
        return NO_LORA
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = target_modules(model, lora)
    read = [m.in_features for m in modules.values()]
    # Of one parent and width: queries, keys and values read the same, and the output projection what attention keeps.
    tensors = {(name.rpartition(".")[0], m.in_features) for name, m in modules.items()}
    numbers = lora.rank * (sum(read) + sum(m.out_features for m in modules.values()))
    return LoraSize(numbers, sum(read), sum(width for _, width in tensors))


def add_lora(model: PreTrainedModel, lora: Lora) -> tuple[dict[str, nn.Parameter], list[nn.Module]]:
    """Put adapters beside the target modules; they start at no change and are float32 whatever the model is.

    Returns the trainable factors, as `lora.<weight>.A` and `lora.<weight>.B`, and the modules that hold them.

    Raises:
        UserError: as `target_modules` does.
    """
    target_modules(model, lora)
    inject_adapter_in_model(lora_config(lora), model)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        for factor in ("A", "B"):
            ending = f".lora_{factor}.default.weight"
            if name.endswith(ending):
                parameter.data = parameter.data.float()
                found[f"{PREFIX}{name.removesuffix(ending)}.weight.{factor}"] = parameter
    return found, [module for module in model.modules() if isinstance(module, LoraLayer)]


def switch_lora(adapters: list[nn.Module], on: bool) -> None:
    """Let the adapters take part in the forward pass, or not; what is trainable stays so."""
    for module in adapters:
        module._disable_adapters = not on  # type: ignore[assignment]


def remove_lora(model: PreTrainedModel) -> None:
    """Put the plain modules back."""
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
    """For a while, the model's weights are the merged ones; they are put back as they were, to the bit."""
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


def merge_checkpoint(folder: Path, factors: Factors) -> None:
    """Merge into the checkpoint's weight files, in place.

    Raises:
        UserError: if a file cannot be written.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()) & set(factors), file.metadata()
        if names:
            weights = load_file(path)
            weights |= {name: merged(weights[name], factors[name]) for name in names}
            save_weights(weights, path, metadata)
