"""Rows longer than memory: layers that keep their inputs alone, inputs that wait on the CPU, MLPs a tile at a time.

With gradient checkpointing a layer keeps its input and is computed again in the backward pass. What attention gave can
be kept as well: one more tensor of the input's size, and on long rows most of what would be computed again. The largest
thing left is then one layer's working set, most of it the MLP's. Tiles make that small too, for one more forward of the
MLPs; the inputs can wait in the CPU's memory. None of it changes a gradient by more than the order of sums.

Shapes: hidden states are `[b, n, h]`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ..errors import UserError
from ..models import by_chunks, decoder_layers

KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""What `scaled_dot_product_attention` runs, where it does not write the products out."""


def checkpoint_layers(model: PreTrainedModel, keep_attention: bool = False) -> None:
    """Keep the layers' inputs and compute the rest again in the backward pass; all but attention, if that is kept.

    Non-reentrant: reentrant checkpointing fails with shared cos and sin. Attention that is computed by plain products
    (eager, or what torch falls back to) is not among `KERNELS`, and is computed again all the same.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        kept = [getattr(torch.ops.aten, name).default for name in KERNELS if hasattr(torch.ops.aten, name)]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    # The switch has a new name in newer releases of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def offload_inputs(model: PreTrainedModel, device: str | None = None) -> None:
    """Let the inputs of checkpointed layers wait on the CPU; gradient checkpointing must be switched on already.

    Around the checkpoint alone: outside it the frozen matrices of the model are kept too, which are on the device
    anyway; inside, a layer keeps nothing until it is computed again.

    Args:
        model: it stays as it is but for that.
        device: the kind it will run on, where it is not there yet (FSDP moves it later).
    """
    device = device or next(model.parameters()).device.type
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            module._gradient_checkpointing_func = _waiting(run, device)  # type: ignore[assignment]


def _waiting(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=device != "cpu", device_type=device):
            return run(*args, **kwargs)

    return offloaded


def tile_mlps(model: PreTrainedModel, tile: int) -> None:
    """Compute every layer's MLP `tile` tokens at a time, in both passes.

    Raises:
        UserError: if layers have no plain MLP, as where experts share the tokens of a row among them.
    """
    mlps = [getattr(layer, "mlp", None) for layer in decoder_layers(model)]
    if not mlps or any(mlp is None or hasattr(mlp, "experts") or hasattr(mlp, "gate") for mlp in mlps):
        raise UserError(
            f"train.tiled_mlp: layers of {model.config.model_type} have no plain MLP that tokens pass one by one; set "
            "it to null"
        )
    for mlp in mlps:
        assert mlp is not None
        mlp.forward = _tiled(mlp.forward, tile)


def _tiled(whole: Callable[[Tensor], Tensor], tile: int) -> Callable[[Tensor], Tensor]:
    return lambda hidden: by_chunks(whole, hidden, size=tile, dim=1)
