"""Attach trainable or fixed numbers to a loaded model, and detach them.

The rotary module is replaced, numbers that act in the weights are applied by forward hooks on the modules whose weights
they will be folded into, and LoRA adapters are added to the target modules. The model itself is frozen and unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..recipe import Lora
from .kinds import KINDS
from .lora import add_lora, remove_lora
from .parameters import Adjustment, Start, WeightFold
from .replacement import FixedRotary, RotaryProxy, swap
from .rotary import TunableRotary

Values = Callable[[], WeightFold | None]
"""Returns the values during a forward pass; None leaves the outputs unchanged."""


def attach(
    model: PreTrainedModel,
    start: Start,
    frequencies: str,
    adjustments: Sequence[Adjustment] = (),
    lora: Lora | None = None,
) -> TunableRotary:
    """Freeze the model and attach the parameters; `detach` undoes it.

    The model must be loaded in its final dtype. It then computes search-free YaRN.

    Args:
        model: the model, with its stock rotary module.
        start: values of the table at the start.
        frequencies: as in `rope.frequencies`.
        adjustments: parameters that act in the weights.
        lora: section of the recipe; adapters are added to the target modules.

    Raises:
        RuntimeError: if something is attached already.
        UserError: if a target of `lora` is not a linear module of this model.
    """
    rotary = swap(model, lambda stock: TunableRotary(stock, start, frequencies, adjustments).to(model.device))
    if lora is not None:
        rotary.lora = add_lora(model, lora)

    def unless_bypassed(adjustment: Adjustment) -> Values:
        return lambda: None if rotary.bypassed else adjustment()

    for adjustment in rotary.adjustments:
        rotary.handles += add_hooks(model, adjustment(), unless_bypassed(adjustment))
    return rotary


def attach_fixed(
    model: PreTrainedModel, table_of: Callable[[int], tuple[Tensor, float]], folds: Sequence[WeightFold] = ()
) -> FixedRotary:
    """Attach a given table (see `FixedRotary`) and given values of numbers that act in the weights."""
    rotary = swap(model, lambda stock: FixedRotary(stock, table_of))
    for fold in folds:
        placed = fold.placed(model)
        rotary.handles += add_hooks(model, fold, lambda placed=placed: placed)  # type: ignore[misc]
    return rotary


def add_hooks(model: nn.Module, places: WeightFold, values: Values) -> list[RemovableHandle]:
    """Apply values to the outputs of the modules that `places` acts on, in every forward pass.

    Raises:
        RuntimeError: if the model has no such module.
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            now = values()
            return None if now is None else now.adjust(name, output)

        return hook

    return [module.register_forward_hook(hook_of(name)) for name, module in modules_of(model, places).items()]


def observe(model: nn.Module, rotary: TunableRotary) -> list[RemovableHandle]:
    """Add hooks that measure the activation sizes to which learning rates are relative, unless they were measured."""

    def hook_of(adjustment: Adjustment, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not rotary.bypassed:
                adjustment.observe(name, output.detach())

        return hook

    unmeasured = [(each, modules_of(model, each())) for each in rotary.adjustments if each.unscaled()]
    return [m.register_forward_hook(hook_of(each, name)) for each, found in unmeasured for name, m in found.items()]


def modules_of(model: nn.Module, places: WeightFold) -> dict[str, nn.Module]:
    """The modules that values act on, by name.

    Raises:
        RuntimeError: if the model has none.
    """
    found = {name: module for name, module in model.named_modules() if places.acts_on(name)}
    if not found:
        raise RuntimeError(f"no module of this model has the weights that numbers of kind {places.kind} act in")
    return found


class FollowingHooks:
    """Hooks as from `add_hooks`, for a model whose modules may be wrapped or unwrapped later, for example by LoRA."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._acts: dict[str, tuple[WeightFold, Values]] = {}
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._handles: list[RemovableHandle] = []

    def add(self, places: WeightFold, values: Values) -> None:
        """Add the values of one kind; a kind that was added before is not changed."""
        kinds = {**{places.kind: (places, values)}, **self._acts}
        self._acts = {kind: kinds[kind] for kind in KINDS if kind in kinds}  # applied in the order of the table
        self.remove()

    def follow(self) -> None:
        """Register the hooks on the current modules, unless they are registered there already."""
        if self._places and all(getattr(parent, name) is module for parent, name, module in self._places):
            return
        self.remove()
        for places, values in self._acts.values():
            for path, module in modules_of(self._model, places).items():
                parent, _, name = path.rpartition(".")
                self._places.append((self._model.get_submodule(parent), name, module))
            self._handles += add_hooks(self._model, places, values)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._places, self._handles = [], []


@contextmanager
def base_model_active(rotary: TunableRotary) -> Iterator[None]:
    """Within the context, the model that `rotary` is attached to gives the outputs of the base."""
    rotary.bypassed = True
    rotary.lora.switch(False)
    try:
        yield
    finally:
        rotary.bypassed = False
        rotary.lora.switch(True)


def detach(model: PreTrainedModel) -> None:
    """Restore the stock modules; the module that `attach` returned keeps the learned numbers."""
    remove_lora(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RotaryProxy):
                for handle in child.rotary.handles:
                    handle.remove()
                setattr(parent, name, child.rotary.stock)
