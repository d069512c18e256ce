"""Biases of queries and keys: offsets added by the projections, before any norm and before the rotation.

With offsets a and b the logit of a query at position n and a key at position m is (q + a)' R(n - m) (k + b), which
contains a' R(n - m) b: a prior over relative positions per head, which the weights alone cannot express. They are
exported as ordinary biases of the projections. Where the family's config has a switch for them, it is turned on, and
the other projections that it covers get biases of zero.

The parameters are relative to the size of queries or keys in their layer, zero at the start:

    query_bias, key_bias    offset / size, `[tuned layers, rows]`           trained
    query_size, key_size    RMS of the projection's output, `[tuned layers]`  measured once, 0 until then
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..errors import UserError
from ..models import as_twin, config_object, family_of, head_dim_of, text_section, tuned_layers
from .parameters import Adjustment, WeightFold

SEPARATE = r"layers\.(\d+)\.self_attn\.{}_proj"
FUSED = r"layers\.(\d+)\.(self_attn|attention)\.query_key_value"


@dataclass(frozen=True, eq=False)
class BiasSite:
    """Where one model has, or can have, biases of queries and keys."""

    config: dict[str, Any] = field(repr=False)
    """config.json of the base."""
    query_modules: re.Pattern[str]
    """Matches names of modules; group 1 is the layer."""
    key_modules: re.Pattern[str]
    query_rows: Tensor
    """Rows of queries in the output of their module, `[q]`."""
    key_rows: Tensor
    """Rows of keys in the output of their module, `[k]`."""
    layers: tuple[int, ...]
    """Layers that are rotated with the tuned table, in order."""
    changes: dict[str, bool]
    """Config keys to change, so that the model has biases; empty where it has them."""

    def layer_of(self, module: str, pattern: re.Pattern[str]) -> int | None:
        """Index into `layers` of a module that the pattern matches; None where it does not."""
        match = pattern.search(module)
        return self.layers.index(int(match[1])) if match and int(match[1]) in self.layers else None

    @cached_property
    def added(self) -> dict[str, torch.Size]:
        """Tensors, by name, that the model has only with the changes."""
        if not self.changes:
            return {}
        before, after = (self._tensors(changes) for changes in ({}, self.changes))
        return {name: shape for name, shape in after.items() if name not in before}

    def _tensors(self, changes: dict[str, bool]) -> dict[str, torch.Size]:
        config = config_object(self.config | changes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return {name: parameter.shape for name, parameter in model.named_parameters()}


def bias_site(config: dict[str, Any]) -> BiasSite:
    """Where this model has, or can have, biases of queries and keys.

    Args:
        config: config.json.

    Raises:
        UserError: if it can have none, with the reason.
    """
    kind = config.get("model_type", "")
    family = family_of(kind)
    if text_section(config) is not config:
        raise UserError("rope.qk_bias: biases of a language model inside a multimodal one are not supported; set it to "
                        "false, or take the language model out of the checkpoint")  # fmt: skip
    if family.twin and not family.bias_key:  # the checkpoint is written as its twin
        config, family = as_twin(config), family_of(family.twin)
    check_biased(config)
    bare = config_object(config)
    off = bool(family.bias_key) and not getattr(bare, family.bias_key)
    heads, size = bare.num_attention_heads, head_dim_of(bare)
    keys = getattr(bare, "num_key_value_heads", None) or heads
    fused = family.queries is not None and "query_key_value" in family.queries.pattern
    query, key = (FUSED, FUSED) if fused else (SEPARATE.format("q"), SEPARATE.format("k"))
    rows = torch.arange(heads * size), torch.arange(keys * size)
    if family.gated:  # [q, output gate] of head 0, then of head 1, ...
        rows = torch.arange(2 * heads * size).reshape(heads, 2, size)[:, 0].reshape(-1), rows[1]
    if fused:  # [q, k, v] of head 0, then of head 1, ...
        by_head = torch.arange(3 * heads * size).reshape(heads, 3, size)
        rows = by_head[:, 0].reshape(-1), by_head[:, 1].reshape(-1)
    return BiasSite(
        config=config,
        query_modules=re.compile(f"{query}$"),
        key_modules=re.compile(f"{key}$"),
        query_rows=rows[0],
        key_rows=rows[1],
        layers=tuple(sorted(tuned_layers(bare))),
        changes={family.bias_key: True} if off else {},
    )


def check_biased(config: dict[str, Any]) -> None:
    """Check that a checkpoint with this config.json can have biases of queries and keys.

    Raises:
        UserError: if it cannot, with the remedy.
    """
    kind = config.get("model_type", "")
    family = family_of(kind)
    if not (family.biased or family.bias_key):
        remedy = "set it to false"
        if family.twin:
            remedy = "set export.as_llama to true, which writes the same model as a Llama, or rope.qk_bias to false"
        raise UserError(
            f"rope.qk_bias: {kind} is not known to have biases of queries and keys, or a config key that adds them; "
            f"{remedy}"
        )


@dataclass(frozen=True)
class BiasFold(WeightFold):
    """Values of the offsets of queries and keys."""

    kind: ClassVar[str] = "bias"
    site: BiasSite
    query: Tensor
    """`[tuned layers, q]`, in the units of the projection's output."""
    key: Tensor
    """`[tuned layers, k]`."""

    def _offset(self, module: str, rows: int) -> Tensor | None:
        """The offset added to the output `[..., rows]` of a module; None if there is none."""
        site, found = self.site, None
        parts = (site.query_modules, site.query_rows, self.query), (site.key_modules, site.key_rows, self.key)
        for pattern, places, values in parts:
            layer = site.layer_of(module, pattern)
            if layer is None:
                continue
            found = values.new_zeros(rows) if found is None else found
            found = found.index_put((places.to(values.device),), values[layer])
        return found

    def acts_on(self, module: str) -> bool:
        """Whether the module returns queries or keys of a tuned layer."""
        patterns = self.site.query_modules, self.site.key_modules
        return any(self.site.layer_of(module, pattern) is not None for pattern in patterns)

    def adjust(self, module: str, output: Tensor) -> Tensor:
        """Queries and keys `[..., rows]` with their offsets added."""
        offset = self._offset(module, output.shape[-1])
        return output if offset is None else (output + offset).to(output.dtype)

    def holds(self, tensor: str) -> bool:
        """Whether the tensor is a bias of queries or keys of a tuned layer."""
        return tensor.endswith(".bias") and self.acts_on(tensor.removesuffix(".bias"))

    def fold(self, name: str, tensor: Tensor) -> Tensor:
        """The bias with the offsets added, float64."""
        offset = self._offset(name.removesuffix(".bias"), tensor.shape[0])
        assert offset is not None
        return tensor.double() + offset.double()

    def added(self) -> dict[str, torch.Size]:
        """The biases that the checkpoint lacks."""
        return self.site.added

    def config_changes(self) -> dict[str, Any]:
        """The config key that enables the biases, if it is off."""
        return self.site.changes

    def summary(self) -> dict[str, float]:
        """The largest offset of queries, and of keys."""
        return {"largest_query_bias": self.query.abs().max().item(), "largest_key_bias": self.key.abs().max().item()}


class Biases(Adjustment):
    """The trainable offsets of `rope.qk_bias`; see the module docstring."""

    place = "biases"

    def __init__(self, site: BiasSite) -> None:
        super().__init__()
        self.site = site
        layers = len(site.layers)
        self.query_bias = nn.Parameter(torch.zeros(layers, site.query_rows.numel()))
        self.key_bias = nn.Parameter(torch.zeros(layers, site.key_rows.numel()))
        self.query_size = nn.Parameter(torch.zeros(layers), requires_grad=False)
        self.key_size = nn.Parameter(torch.zeros(layers), requires_grad=False)
        self._sums = torch.zeros(2, layers, 2, dtype=torch.float64)
        """Sum of squares and count per layer, of queries and of keys."""

    def forward(self) -> BiasFold:
        """The current offsets, differentiable."""
        query, key = self.query_bias * self.query_size[:, None], self.key_bias * self.key_size[:, None]
        return BiasFold(self.site, query, key)

    @torch.no_grad()
    def exact(self) -> BiasFold:
        """The offsets in double precision, on the CPU."""
        bias, size = ([p.cpu().double() for p in pair] for pair in self._pairs())
        return BiasFold(self.site, bias[0] * size[0][:, None], bias[1] * size[1][:, None])

    def _pairs(self) -> tuple[tuple[nn.Parameter, nn.Parameter], tuple[nn.Parameter, nn.Parameter]]:
        return (self.query_bias, self.key_bias), (self.query_size, self.key_size)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind."""
        return {"bias": [self.query_bias, self.key_bias]}

    def unscaled(self) -> bool:
        """Whether the sizes were not measured yet; until then the offsets are zero."""
        return not bool(self.query_size.any() or self.key_size.any())

    @torch.no_grad()
    def observe(self, module: str, output: Tensor) -> None:
        """Add the output of a module to the measurement of the sizes."""
        site = self.site
        parts = (site.query_modules, site.query_rows), (site.key_modules, site.key_rows)
        for which, (pattern, rows) in enumerate(parts):
            layer = site.layer_of(module, pattern)
            if layer is not None:
                squares = output[..., rows.to(output.device)].float().square()
                self._sums[which, layer, 0] += squares.mean(-1).double().sum().item()
                self._sums[which, layer, 1] += squares[..., 0].numel()

    @torch.no_grad()
    def set_scale(self, total: Callable[[Tensor], Tensor]) -> None:
        """Set the sizes to those observed; `total` sums a float32 tensor over all processes."""
        sums = total(self._sums.float().to(self.query_size.device))
        sizes = (sums[..., 0] / sums[..., 1].clamp(min=1)).sqrt()
        self.query_size.copy_(sizes[0])
        self.key_size.copy_(sizes[1])
        self._sums.zero_()


def biases_for(config: dict[str, Any], qk_bias: bool) -> Biases | None:
    """Biases at zero; None if they are not learned.

    Raises:
        UserError: if this family can have none, with the reason.
    """
    return Biases(bias_site(config)) if qk_bias else None
