"""What is learned about queries, in the weights: query rows multiplied, exactly, instead of keys in the config.

Logits are q . k, and RoPE rotates both in pairs. Multiplying the two rows of a pair in the query projection by one
complex number commutes with the rotation (`queries.py` has the places): no server can miss it. Keys stay as they are,
so a KV cache is the same with and without. The attention temperature goes here where a stack reads no key for it; the
gains learned by layer, head and pair always do.

"Exact" is real arithmetic: a checkpoint in bfloat16 rounds every folded weight anew (about 0.1% each);
`Folded.rounding` says how much that was.

Shapes: gains are `[tuned layers, groups, d/2]`, groups being query heads, or 1 where they share a norm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..models import QuerySite, query_site, save_weights, scaled


@dataclass(frozen=True)
class Folded:
    """What was folded."""

    gain: float
    tensors: int
    numbers: int
    rounding: float
    """Root mean square of the relative change by rounding to the checkpoint's dtype; 0 for float32 to its precision."""


def gains_of(site: QuerySite, gain: float, gains: Tensor | None = None) -> Tensor:
    """What queries are multiplied by in all, `[tuned layers, groups, d/2]`: `gain`, and learned `gains` on top."""
    shape = (len(site.layers), site.groups, site.pairs.numel() // 2)
    return gain * (torch.ones(shape, dtype=torch.float64) if gains is None else gains)


def fold(tensor: Tensor, site: QuerySite, gains: Tensor) -> Tensor:
    """One weight or bias with its rotated query rows multiplied, in its own dtype.

    Args:
        tensor: `[rows, ...]`.
        site: where its rows are.
        gains: `[groups, d/2]` of this tensor's layer, float64 or complex128.
    """
    rows_last = (tensor.double() + site.shift).movedim(0, -1)
    return (scaled(rows_last, site, gains).movedim(-1, 0) - site.shift).to(tensor.dtype)


def fold_named(name: str, tensor: Tensor, site: QuerySite, gains: Tensor) -> tuple[Tensor, Tensor]:
    """`fold` for a tensor by its name, and the same without rounding (float64); gains are those of all layers."""
    flat = tensor.reshape(-1) if site.normed else tensor
    exact = fold(flat.double(), site, site.gains_for(name, gains)).reshape(tensor.shape)
    return exact.to(tensor.dtype), exact


def fold_parameters(model: nn.Module, config: dict[str, Any], gain: float, gains: Tensor | None) -> dict[str, Tensor]:
    """What `fold_checkpoint` makes of a model's parameters, by name, on the CPU; the model stays as it is."""
    site = query_site(config)
    whole = gains_of(site, gain, gains)
    named = {name: p.detach().cpu() for name, p in model.named_parameters() if site.holds(name)}
    return {name: fold_named(name, tensor, site, whole)[0] for name, tensor in named.items()}


def fold_checkpoint(folder: Path, config: dict[str, Any], gain: float, gains: Tensor | None = None) -> Folded:
    """Multiply the rotated rows of the queries in the checkpoint's weight files, in place.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        gain: for all rotated dimensions of tuned layers.
        gains: learned ones on top, `[tuned layers, groups, d/2]`.

    Raises:
        UserError: if this family cannot carry it, and nothing is written then; or if a file cannot be written.
    """
    site = query_site(config)
    whole = gains_of(site, gain, gains)
    tensors = numbers = 0
    squares = 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = [n for n in file.keys() if site.holds(n)], file.metadata()  # noqa: SIM118
        if not names:
            continue
        weights = load_file(path)
        for name in names:
            new, exact = fold_named(name, weights[name], site, whole)
            changed = (exact != weights[name].double()) & (exact != 0)
            squares += ((new.double()[changed] / exact[changed] - 1) ** 2).sum().item()
            weights[name] = new
            tensors, numbers = tensors + 1, numbers + int(changed.sum())
        save_weights(weights, path, metadata)
    if not tensors:
        raise UserError(f"folding: no query projection found in {folder}")
    return Folded(gain, tensors, numbers, (squares / max(1, numbers)) ** 0.5)
