"""Fold learned values into the tensors of a checkpoint, or of a loaded model.

Folding is exact in real arithmetic. A checkpoint in bfloat16 rounds every folded weight again (by about 0.1% each);
`Folded.rounding` measures this. The attention temperature is folded into the queries where a stack reads no config key
for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_json
from ..models import UNQUANTISED, check_plain, query_site, save_weights
from .parameters import WeightFold
from .query_gains import GainFold, uniform_gain


@dataclass(frozen=True)
class Folded:
    """Summary of what was folded into a checkpoint."""

    gain: float
    """Factor on the logits from the part of the temperature that was folded."""
    tensors: int
    numbers: int
    rounding: float
    """Root mean square of the relative change from rounding to the checkpoint's dtype; near 0 for float32."""


def with_gain(config: dict[str, Any], gain: float, folds: Sequence[WeightFold]) -> list[WeightFold]:
    """The values to fold, with a gain of all queries multiplied into their gains.

    Args:
        config: config.json of the base.
        gain: factor on the logits from the temperature that is folded into the queries; 1 for none.
        folds: learned values, in the order in which they are applied.

    Raises:
        UserError: if the gain cannot be folded into this family.
    """
    if any(isinstance(fold, GainFold) for fold in folds):
        return [replace(fold, gains=gain * fold.gains) if isinstance(fold, GainFold) else fold for fold in folds]
    return [*folds, *([] if gain == 1.0 else [uniform_gain(query_site(config), gain)])]


def fold_tensor(name: str, tensor: Tensor, folds: Sequence[WeightFold]) -> Tensor:
    """The tensor with all values that act on it folded in, float64."""
    exact = tensor.double()
    for fold in folds:
        if fold.holds(name):
            exact = fold.fold(name, exact)
    return exact


def config_changes(folds: Sequence[WeightFold]) -> dict[str, Any]:
    """Keys of config.json that a checkpoint with these values folded needs."""
    return {key: value for fold in folds for key, value in fold.config_changes().items()}


def fold_parameters(
    model: nn.Module, config: dict[str, Any], gain: float, folds: Sequence[WeightFold]
) -> dict[str, Tensor]:
    """The parameters that `fold_checkpoint` would change, folded, by name, on the CPU; the model is unchanged."""
    every = with_gain(config, gain, folds)
    parameters = dict(model.named_parameters())
    named = {n: p.detach().cpu() for n, p in parameters.items() if any(fold.holds(n) for fold in every)}
    dtype = next(iter(parameters.values())).dtype
    for fold in every:
        named |= {n: torch.zeros(s, dtype=dtype) for n, s in fold.added().items() if n not in parameters}
    check_plain(named)
    if every and not named:
        raise UserError(f"folding: the model has no parameter that the learned numbers act in; {UNQUANTISED}")
    return {name: fold_tensor(name, tensor, every).to(tensor.dtype) for name, tensor in named.items()}


@torch.no_grad()
def set_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model's parameters, by name; biases that its modules lack are added."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].copy_(tensor)
        else:
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            like = next(module.parameters())
            setattr(module, last, nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False))


def _index(folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
    """Add new tensors of a weight file to the index of a checkpoint that has several files."""
    path = folder / "model.safetensors.index.json"
    if tensors and path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(tensors, file)
        sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += sizes
        write_json(path, index)


def fold_checkpoint(folder: Path, config: dict[str, Any], gain: float, folds: Sequence[WeightFold] = ()) -> Folded:
    """Fold values into the checkpoint's weight files, in place.

    Args:
        folder: the folder of the checkpoint.
        config: its config.json.
        gain: gain of all rotated query dimensions of tuned layers.
        folds: learned values, in the order in which they are applied.

    Raises:
        UserError: if values cannot be folded into this family (nothing is written then), or a file cannot be written.
    """
    every = with_gain(config, gain, folds)
    added = {name: shape for fold in every for name, shape in fold.added().items()}
    tensors = numbers = 0
    squares = 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata()
        # A new bias goes into the file of its weight.
        new_here = {n: added.pop(n) for n in sorted(added) if f"{n.removesuffix('bias')}weight" in names}
        held = [n for n in sorted({*names, *new_here}) if any(fold.holds(n) for fold in every)]
        if not held and not new_here:
            continue
        weights = load_file(path)
        for name, shape in new_here.items():
            weights[name] = torch.zeros(shape, dtype=weights[f"{name.removesuffix('bias')}weight"].dtype)
        _index(folder, path.name, {name: weights[name] for name in new_here})
        check_plain({name: weights[name] for name in held})
        for name in held:
            exact = fold_tensor(name, weights[name], every)
            new = exact.to(weights[name].dtype)
            changed = (exact != weights[name].double()) & (exact != 0)
            squares += ((new.double()[changed] / exact[changed] - 1) ** 2).sum().item()
            weights[name] = new
            tensors, numbers = tensors + 1, numbers + int(changed.sum())
        save_weights(weights, path, metadata)
    if added:
        raise UserError(f"folding: {folder} has no weights to which {', '.join(sorted(added)[:3])} ... belong")
    if not tensors:
        raise UserError(f"folding: no tensor found in {folder} that the learned numbers act in")
    return Folded(gain, tensors, numbers, (squares / max(1, numbers)) ** 0.5)
