"""Replacement of the stock rotary module of a model, for any table of frequencies.

HF's rotary modules compute cos and sin under `torch.no_grad` from a buffer `inv_freq` and a float `attention_scaling`.
The replacement unwraps their `forward`, which has the layout of the family, and calls it with its own values, which
may be differentiable. `attachment.detach` restores the stock module.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..models import FULL, rotary_site


class RotaryReplacement(nn.Module):
    """Replaces a stock rotary module; subclasses define the table and the multiplier."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the stock module is not registered as a child of this one.
        self._stock = (stock,)
        self.handles: list[RemovableHandle] = []
        """Handles of the hooks that apply numbers that act in the weights."""
        self.bypassed = False
        """Whether the model currently gives the outputs of the base; see `base_model_active`."""
        self._layout: Callable[..., Any] = inspect.unwrap(type(stock).forward)

    @property
    def stock(self) -> nn.Module:
        """The module that this one replaces."""
        return self._stock[0]

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor | float]:
        """Inverse frequencies `[d/2]` and the multiplier of cos and sin for these positions."""
        raise NotImplementedError

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cos and sin in the family's own layout and in `x`'s dtype; see the family's rotary class.

        Where the family has one table per kind of layer, only that of full attention is replaced.
        """
        if layer_type not in (None, FULL):
            return self.stock(x, position_ids, layer_type)
        if self.bypassed:
            return self.stock(x, position_ids) if layer_type is None else self.stock(x, position_ids, layer_type)
        inv_freq, multiplier = self.table(position_ids)
        if layer_type is not None and self.stock.rope_type[layer_type] == "proportional":  # type: ignore[index]
            whole = getattr(self.stock, f"{layer_type}_inv_freq").numel()
            inv_freq = nn.functional.pad(inv_freq, (0, whole - inv_freq.numel()))
        prefix, kind = ("", ()) if layer_type is None else (f"{layer_type}_", (layer_type,))
        if isinstance(multiplier, Tensor):
            multiplier = multiplier.to(x.device)
        values = {f"{prefix}inv_freq": inv_freq.to(x.device), f"{prefix}attention_scaling": multiplier}
        return self._layout(Overlaid(self.stock, values), x, position_ids, *kind)


class Overlaid:
    """The stock rotary module with some attributes replaced; it provides all others (Qwen3.5's mrope)."""

    def __init__(self, stock: nn.Module, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


class RotaryProxy(nn.Module):
    """Hides the parameters of the replacement from the model, so that sharding and casting skip them."""

    def __init__(self, rotary: RotaryReplacement) -> None:
        super().__init__()
        # In a tuple, so that it is not registered as a child.
        self._rotary = (rotary,)

    @property
    def rotary(self) -> RotaryReplacement:
        """The module with the parameters."""
        return self._rotary[0]

    @property
    def layer_types(self) -> Any:
        """The kinds of layers with a table each, which models read from the stock module (LFM3)."""
        return self.rotary.stock.layer_types

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call `RotaryReplacement.forward`."""
        return self.rotary(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryProxy":
        """Move the parameters with the model."""
        self.rotary._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "this model has yarn_tune's rotary module attached, and saving it now would lose the learned numbers. "
            "Call detach(model) first, or export the run"
        )


class FixedRotary(RotaryReplacement):
    """A given table, for comparing methods: `table_of(longest position + 1)` gives `[d/2]` and a multiplier."""

    def __init__(self, stock: nn.Module, table_of: Callable[[int], tuple[Tensor, float]]) -> None:
        super().__init__(stock)
        self._table_of = table_of

    def table(self, positions: Tensor) -> tuple[Tensor, float]:
        """The table for the length of the input."""
        return self._table_of(int(positions.max()) + 1)


ReplacementT = TypeVar("ReplacementT", bound=RotaryReplacement)


def swap(model: PreTrainedModel, make: Callable[[nn.Module], ReplacementT]) -> ReplacementT:
    """Replace the rotary module, and freeze the model.

    Raises:
        RuntimeError: if it is replaced already.
    """
    if any(isinstance(module, RotaryProxy) for module in model.modules()):
        raise RuntimeError("this model has a yarn_tune rotary module attached already; call detach(model) first")
    parent, name = rotary_site(model)
    rotary = make(getattr(parent, name))
    model.requires_grad_(False)
    setattr(parent, name, RotaryProxy(rotary))
    return rotary


def move_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Restrict `fn` to moves between devices; a change of dtype is ignored."""

    def moved(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

    return moved
