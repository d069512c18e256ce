"""One model over many processes: sharded frozen weights (DeepSpeed's ZeRO-3 or torch's FSDP2), and split rows.

The learned parameters stay whole and float32 in every process, hidden from module traversal (`tunable.RotaryProxy`).
DeepSpeed and FSDP therefore have no optimizer, gradients, clipping or mixed precision here: they only gather the
weights of a layer before it is used and release them afterwards. ZeRO-1 and ZeRO-2 would shard the optimizer states and
gradients of a few learned parameters, which saves nothing over data parallelism, so they are not offered.

Rows are split by DeepSpeed's Ulysses: each of `runtime.sequence` processes holds one part of a row, and attention
exchanges tokens for heads. The backward pass of the exchange is exact, so gradients are sums over processes.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CheckFailed, UserError
from ..models import decoder_layers, has_sliding_layers, slow_dtype
from ..recipe import Runtime
from .processes import World

Release = Callable[[], None]
"""Releases gathered weights; must be called after each backward pass."""


@dataclass(frozen=True)
class Sharding:
    """How a run's frozen weights and rows are distributed over its processes."""

    runtime: Runtime
    """Section of the recipe."""
    dtype: str
    """Dtype of the frozen weights."""
    micro_batch_size: int
    """Rows per forward pass."""

    @property
    def offloaded(self) -> bool:
        """Whether shards are kept in the CPU's memory."""
        return self.runtime.offload == "cpu"

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the frozen weights."""
        return self.runtime.zero == 3 or self.runtime.fsdp

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's config. It has no learning rate and no clipping: the training loop does both."""
        zero: dict[str, Any] = {"stage": 3}
        if self.offloaded:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
        return {
            "zero_optimization": zero,
            # Without an optimizer this is not mixed precision: it is the dtype in which weights are loaded.
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
        }


@contextmanager
def loading(sharding: Sharding, world: World) -> Iterator[None]:
    """Under `runtime.zero: 3`, a model that is loaded in this context is sharded while it is loaded."""
    if sharding.runtime.zero != 3:
        yield
        return
    _with_deepspeed(world)
    # transformers shards the models that it loads while this object exists.
    config = HfDeepSpeedConfig(sharding.deepspeed_config())
    try:
        yield
    finally:
        del config


def check_weights(model: nn.Module, dtype: str) -> None:
    """Check the dtype of the frozen weights, which loading in shards may silently ignore.

    Raises:
        CheckFailed: if most of them have another dtype. Quantised weights (integers and floats of 8 bits) do not count.
    """
    plain = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    found = Counter(plain).most_common(1)
    if found and found[0][0] != getattr(torch, dtype):
        raise CheckFailed(f"start: weights were loaded as {found[0][0]}, though base.dtype is {dtype}")


@contextmanager
def spread(
    objective: nn.Module, model: PreTrainedModel, parameters: list[nn.Parameter], sharding: Sharding, world: World
) -> Iterator[Release]:
    """Within the context, the objective runs over all processes of the world.

    Args:
        objective: the module whose forward pass is the loss.
        model: the frozen model inside it.
        parameters: the learned parameters, which must stay whole.
        sharding: how to distribute weights and rows.
        world: the processes.

    Raises:
        UserError: if this model cannot be sharded or its rows cannot be split, with the reason.
        CheckFailed: if a learned parameter was cast or sharded.
    """
    release: Release = lambda: None  # noqa: E731
    with _rows_split(model, sharding.micro_batch_size, world):
        if sharding.runtime.zero == 3:
            release = _zero(objective, sharding, world)
        elif sharding.runtime.fsdp:
            _fsdp(objective, model, sharding, world)
        check_parameters(parameters)
        yield release


def check_parameters(parameters: list[nn.Parameter]) -> None:
    """Check that the learned parameters are float32 and whole; otherwise steps would be lost in rounding.

    Raises:
        CheckFailed: if one was cast or sharded.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32 or not parameter.numel():
            kind = f"{parameter.dtype}, shape {tuple(parameter.shape)}"
            raise CheckFailed(f"start: learned parameters must be float32 and whole in every process, found {kind}")


def _zero(objective: nn.Module, sharding: Sharding, world: World) -> Release:
    deepspeed = _with_deepspeed(world)
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                # A LoRA factor stays the module's attribute, but not a registered parameter that DeepSpeed would shard.
                del module._parameters[name]
                module.__dict__[name] = parameter
    engine, *_ = deepspeed.initialize(model=objective, config=sharding.deepspeed_config())
    release: Release = engine.empty_partition_cache
    return release


def _fsdp(objective: nn.Module, model: PreTrainedModel, sharding: Sharding, world: World) -> None:
    _connect(world)
    policy = CPUOffloadPolicy() if sharding.offloaded else OffloadPolicy()
    mesh = init_device_mesh(world.device.type, (world.processes,))
    learned = {parameter for parameter in objective.parameters() if parameter.requires_grad}
    for module in (*decoder_layers(model), objective):
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=learned)


@contextmanager
def _rows_split(model: PreTrainedModel, micro_batch_size: int, world: World) -> Iterator[None]:
    """Within the context, attention covers whole rows, of which each process of a group holds a part."""
    if world.sequence == 1:
        yield
        return
    _with_deepspeed(world)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    attention = model.config.get_text_config()._attn_implementation
    if has_sliding_layers(model.config.get_text_config()):
        raise UserError(
            f"runtime.sequence: some layers of {model.config.model_type} have sliding-window attention, which "
            "attention over split rows would ignore; set it to 1"
        )
    before = ALL_ATTENTION_FUNCTIONS.get(attention)
    try:
        UlyssesSPAttentionHF.register_with_transformers(
            model, attention, sequence_parallel_size=world.sequence, micro_batch_size=micro_batch_size
        )
    except ValueError as error:
        raise UserError(f"runtime.sequence: {error}") from error
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[attention] = before


def _with_deepspeed(world: World) -> Any:
    """Import DeepSpeed and connect it to the existing process group."""
    import deepspeed

    _connect(world)
    if world.device.type == "cpu":
        # DeepSpeed's shared-memory exchange is for inference only, and compiling it takes minutes. A run that is killed
        # meanwhile leaves a lock file that makes the next run hang.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _connect(world: World) -> None:
    """For a single process: create a process group, and set the environment variables that a launcher would set."""
    if not distributed.is_initialized():
        assert world.processes == 1
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        backend = distributed.get_default_backend_for_device(world.device)
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def world_text(
    sharding: Sharding, world: World, model: nn.Module, batch_size: int, clip: float | None, learned: int
) -> str:
    """Describe the processes, the shards and the parameters of a run in three lines.

    Args:
        sharding: how weights and rows are distributed.
        world: the processes.
        model: the frozen model.
        batch_size: rows per step.
        clip: largest norm of the gradient, if it is clipped.
        learned: the number of learned values.
    """
    # A sharded weight is empty until it is used; DeepSpeed keeps its size in `ds_numel`.
    sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if not p.requires_grad]
    count = "1 process" if world.processes == 1 else f"{world.processes} processes"
    rows = f"{batch_size} rows per step" + (f" shared by {world.groups}" if world.groups > 1 else "")
    parts = f", each row in {world.sequence} parts" if world.sequence > 1 else ""
    by = "DeepSpeed's ZeRO-3" if sharding.runtime.zero == 3 else "FSDP2"
    where = ", kept in the CPU's memory" if sharding.offloaded else ""
    shards = (
        f"in {world.processes} shard{'s'[: world.processes - 1]} ({by}){where}"
        if sharding.sharded
        else "whole in each process"
    )
    clipped = f"clipped at {clip:g}" if clip else "not clipped"
    slow = slow_dtype(sharding.dtype, world.device.type)
    return (
        f"{count} on {world.device.type}: {rows}{parts}\n"
        f"  frozen    {sum(sizes) / 2**30:.2f} GiB of {sharding.dtype} weights, {shards}\n"
        f"  learned   {learned:,} float32 values, whole in each process; gradients summed over all, {clipped}"
        + (f"\n  {slow}" if slow else "")
    )
