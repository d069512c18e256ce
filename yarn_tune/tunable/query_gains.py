"""Temperatures by layer, head and rotary pair: the rungs above one temperature for the whole model.

Everything here commutes with RoPE (`queries.py`), so it is learned on the queries and folded into a stock checkpoint.
What is learned are offsets from identity, float32, all zero at the start:

    temperature   offsets                                                            numbers
    layer         log of one gain a tuned layer                                      layers
    head          log of one gain a layer and query head                             layers x heads
    spectral      log of one gain a layer, head and rotary pair                      layers x heads x d/2
    phase         spectral, and one angle each: a shift of the relative position     twice that

A gain multiplies the logits of its rotated dimensions, so it is 1 / temperature. Where heads share a norm of the
queries, `spectral` learns one gain a layer and pair, and `head` and `phase` are refused.

Shapes: gains are `[tuned layers, groups, d/2]`, complex with phases; groups being query heads, or 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UserError
from ..models import QuerySite, query_site, scaled


class Gains(nn.Module):
    """The learned offsets of one rung."""

    def __init__(self, site: QuerySite, kind: str) -> None:
        super().__init__()
        self.site, self.kind = site, kind
        layers, groups, pairs = len(site.layers), site.groups, site.pairs.numel() // 2
        shape = {"layer": (layers, 1, 1), "head": (layers, groups, 1)}.get(kind, (layers, groups, pairs))
        self.log_gain = nn.Parameter(torch.zeros(shape))
        self.phase = nn.Parameter(torch.zeros(shape)) if kind == "pair_phase" else None

    def forward(self) -> Tensor:
        """Gains `[tuned layers, groups, d/2]`, differentiable; complex with phases."""
        shape = (len(self.site.layers), self.site.groups, self.site.pairs.numel() // 2)
        magnitude = self.log_gain.exp().expand(shape)
        if self.phase is None:
            return magnitude
        return torch.polar(magnitude, self.phase)

    @torch.no_grad()
    def exact(self) -> Tensor:
        """The same in double precision, on the CPU: what is folded."""
        log_gain = self.log_gain.cpu().double().expand(self().shape)
        return log_gain.exp() if self.phase is None else torch.polar(log_gain.exp(), self.phase.cpu().double())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, for their learning rates."""
        groups = {"gain": [self.log_gain]}
        return groups if self.phase is None else groups | {"phase": [self.phase]}


def gains_for(config: dict[str, Any], query_gains: str) -> Gains | None:
    """The rung a recipe asks for, at identity; None for one temperature of the whole model.

    Args:
        config: config.json of the base.
        query_gains: as `rope.query_gains`.

    Raises:
        UserError: if this family cannot carry it, with the reason.
    """
    if query_gains == "none":
        return None
    try:
        site = query_site(config)
    except UserError as error:
        reason = str(error).removeprefix("folding: ")
        raise UserError(f"rope.query_gains: {query_gains} is folded into the queries, and {reason}") from error
    model_type = config["model_type"]
    if site.normed and query_gains == "pair_phase":
        raise UserError(
            f"rope.query_gains: pair_phase cannot be folded here: {model_type} normalises queries; use pair"
        )
    if site.groups == 1 and query_gains == "head":
        raise UserError(
            f"rope.query_gains: head cannot be folded here: heads of {model_type} share one norm of the queries; "
            "use layer or pair (one gain a layer and pair)"
        )
    return Gains(site, query_gains)


def scale_queries(model: PreTrainedModel, site: QuerySite, gains: Callable[[], Tensor | None]) -> list[RemovableHandle]:
    """Multiply the queries of every tuned layer by `gains()`, asked anew in each forward; None leaves them alone.

    Raises:
        RuntimeError: if the model has no module at the site.
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            now = gains()
            if now is None:
                return None
            return scaled(output, site, site.gains_for(name, now)).to(output.dtype)

        return hook

    modules = query_modules(model, site)
    return [module.register_forward_hook(hook_of(f"{name}.weight")) for name, module in modules.items()]


def query_modules(model: PreTrainedModel, site: QuerySite) -> dict[str, nn.Module]:
    """The modules whose output is queries, by name.

    Raises:
        RuntimeError: if the model has none at the site.
    """
    found = {name: module for name, module in model.named_modules() if site.holds(f"{name}.weight")}
    if not found:
        raise RuntimeError("no module of this model has the queries where its family has them")
    return found


class FollowedQueries:
    """The hooks of `scale_queries` on a model in which modules may still be wrapped and unwrapped, as LoRA does."""

    def __init__(self, model: PreTrainedModel, site: QuerySite, gains: Callable[[], Tensor | None]) -> None:
        self._model, self._site, self._gains = model, site, gains
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._handles: list[RemovableHandle] = []

    def follow(self) -> None:
        """Put the hooks on what stands at the site now."""
        if self._places and all(getattr(parent, name) is module for parent, name, module in self._places):
            return
        self.remove()
        for path, module in query_modules(self._model, self._site).items():
            parent, _, name = path.rpartition(".")
            self._places.append((self._model.get_submodule(parent), name, module))
        self._handles = scale_queries(self._model, self._site, self._gains)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._places, self._handles = [], []
