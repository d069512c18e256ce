"""Activation memory of long rows: checkpointed layers, inputs offloaded to the CPU, MLPs computed in tiles.

With gradient checkpointing a layer keeps only its input and recomputes the rest in the backward pass. The output of
attention can be kept as well: it costs one more tensor of the input's size and saves most of the recomputation of long
rows. What remains is the working set of one layer, most of it the MLP's, which tiles reduce at the cost of one more
forward pass of the MLPs. The kept inputs can be offloaded to the CPU. All of these change gradients only by the order
of summation.

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
"""The fused kernels of `scaled_dot_product_attention`."""


def checkpoint_layers(model: PreTrainedModel, keep_attention: bool = False) -> None:
    """Keep the inputs of the layers and recompute the rest in the backward pass.

    Checkpointing is non-reentrant, because reentrant checkpointing fails with cos and sin that layers share.

    Args:
        model: the model to enable gradient checkpointing in.
        keep_attention: keep the outputs of the fused attention kernels (`KERNELS`) too. Eager attention, or torch's
            fallback for it, is recomputed in any case.

    Raises:
        UserError: if transformers does not support checkpointing for this family.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        kept = [getattr(torch.ops.aten, name).default for name in KERNELS if hasattr(torch.ops.aten, name)]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    # Newer releases of transformers renamed this method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(options)
    except ValueError as error:
        raise UserError(
            f"train.gradient_checkpointing: transformers does not support it for {model.config.model_type}; set it to "
            "false"
        ) from error


def offload_inputs(model: PreTrainedModel, device: str | None = None) -> None:
    """Keep the inputs of checkpointed layers in the CPU's memory; gradient checkpointing must be switched on already.

    Only tensors saved by the checkpoint itself are moved. Those saved outside it include frozen matrices, which are on
    the device anyway; inside it, a layer saves nothing until it is recomputed.

    Args:
        model: the model whose checkpointing functions are wrapped.
        device: type of the device that the model will run on, if it is moved later (by FSDP).
    """
    device = device or next(model.parameters()).device.type
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            module._gradient_checkpointing_func = _offloading(run, device)  # type: ignore[assignment]


def _offloading(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=device != "cpu", device_type=device):
            return run(*args, **kwargs)

    return offloaded


def tile_mlps(model: PreTrainedModel, tile: int) -> None:
    """Compute every layer's MLP on `tile` tokens at a time, in the forward and in the backward pass.

    Raises:
        UserError: if the layers have no dense MLP, as in mixtures of experts.
    """
    mlps = [getattr(layer, "mlp", None) for layer in decoder_layers(model)]
    if not mlps or any(mlp is None or hasattr(mlp, "experts") or hasattr(mlp, "gate") for mlp in mlps):
        raise UserError(
            f"train.tiled_mlp: layers of {model.config.model_type} have no plain MLP that handles tokens one by one; "
            "set it to null"
        )
    for mlp in mlps:
        assert mlp is not None
        mlp.forward = _tiled(mlp.forward, tile)


def _tiled(whole: Callable[[Tensor], Tensor], tile: int) -> Callable[[Tensor], Tensor]:
    return lambda hidden: by_chunks(whole, hidden, size=tile, dim=1)
