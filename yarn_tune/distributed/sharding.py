"""One model over many processes: its frozen weights in shards (DeepSpeed's ZeRO-3, torch's FSDP2), its rows in parts.

What is learned stays whole and float32 in every process, out of the sharded modules' sight (`tunable.RotaryProxy`). So
neither DeepSpeed nor FSDP holds an optimizer, a gradient, a clipping or a mixed precision here: they gather a layer's
weights before it is used and drop them after. ZeRO-1 and ZeRO-2 shard the states and gradients of what is learned, of
which there is next to nothing: they are the same as plain data parallelism.

Rows in parts is DeepSpeed's Ulysses: a process holds every `sequence`-th part of each row, and exchanges tokens for
heads around attention. The exchange passes gradients on exactly, so they are sums over processes, as all others are.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ..recipe import Recipe
from .processes import World

Release = Callable[[], None]
"""To be called after each backward pass: gives gathered weights back."""


@contextmanager
def loading(recipe: Recipe, world: World) -> Iterator[None]:
    """While a model is loaded here, each process keeps only its shard of every weight, under `runtime.zero: 3`."""
    if recipe.runtime.zero != 3:
        yield
        return
    _with_deepspeed(world)
    # transformers loads in shards for as long as this object lives.
    announced = HfDeepSpeedConfig(deepspeed_config(recipe))
    try:
        yield
    finally:
        del announced


def check_weights(model: nn.Module, dtype: str) -> None:
    """Frozen weights must have the dtype that was asked for: loading in shards may ignore it without a word.

    Raises:
        CheckFailed: if most of them have another.
    """
    found = Counter(parameter.dtype for parameter in model.parameters()).most_common(1)[0][0]
    if found != getattr(torch, dtype):
        raise CheckFailed(f"start: weights were loaded as {found}, though base.dtype is {dtype}")


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """All that DeepSpeed is told. Learning rate, clipping and batch are the loop's own and stand nowhere here."""
    zero: dict[str, Any] = {"stage": 3}
    if recipe.runtime.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
    return {
        "zero_optimization": zero,
        # Not a mixed precision, since there is no optimizer: the dtype that weights are loaded in.
        "bf16": {"enabled": recipe.base.dtype == "bfloat16"},
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
    }


@contextmanager
def spread(
    objective: nn.Module, model: PreTrainedModel, parameters: list[nn.Parameter], recipe: Recipe, world: World
) -> Iterator[Release]:
    """For as long as it lasts, the objective runs over all processes of the world.

    Raises:
        UserError: if this model cannot be sharded or its rows split, with the reason.
        CheckFailed: if learned numbers did not stay as they were.
    """
    release: Release = lambda: None  # noqa: E731
    with _rows_split(model, recipe, world):
        if recipe.runtime.zero == 3:
            release = _zero(objective, recipe, world)
        elif recipe.runtime.fsdp:
            _fsdp(objective, model, recipe, world)
        check_numbers(parameters)
        yield release


def check_numbers(parameters: list[nn.Parameter]) -> None:
    """What is learned must be float32 and whole, whatever was done to the model.

    Raises:
        CheckFailed: if a number was cast or taken apart: steps would be lost in rounding, without a word.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32 or not parameter.numel():
            kind = f"{parameter.dtype}, shape {tuple(parameter.shape)}"
            raise CheckFailed(f"start: learned numbers must be float32 and whole in every process, found {kind}")


def _zero(objective: nn.Module, recipe: Recipe, world: World) -> Release:
    deepspeed = _with_deepspeed(world)
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                # A LoRA factor: still the module's attribute, and no longer a parameter that DeepSpeed would shard.
                del module._parameters[name]
                module.__dict__[name] = parameter
    engine, *_ = deepspeed.initialize(model=objective, config=deepspeed_config(recipe))
    release: Release = engine.empty_partition_cache
    return release


def _fsdp(objective: nn.Module, model: PreTrainedModel, recipe: Recipe, world: World) -> None:
    _connect(world)
    policy = CPUOffloadPolicy() if recipe.runtime.offload == "cpu" else OffloadPolicy()
    mesh = init_device_mesh(world.device.type, (world.processes,))
    learned = {parameter for parameter in objective.parameters() if parameter.requires_grad}
    for module in (*decoder_layers(model), objective):
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=learned)


@contextmanager
def _rows_split(model: PreTrainedModel, recipe: Recipe, world: World) -> Iterator[None]:
    """While it lasts, attention of this kind of model sees whole rows of which each process holds a part."""
    if world.sequence == 1:
        yield
        return
    _with_deepspeed(world)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    attention = model.config._attn_implementation
    if has_sliding_layers(model.config):
        raise UserError(
            f"runtime.sequence: some layers of {model.config.model_type} look back through a sliding window, which "
            "attention over split rows would ignore; set it to 1"
        )
    before = ALL_ATTENTION_FUNCTIONS.get(attention)
    try:
        UlyssesSPAttentionHF.register_with_transformers(
            model, attention, sequence_parallel_size=world.sequence, micro_batch_size=recipe.train.micro_batch_size
        )
    except ValueError as error:
        raise UserError(f"runtime.sequence: {error}") from error
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[attention] = before


def _with_deepspeed(world: World) -> Any:
    """DeepSpeed, joined to the processes that have found each other already."""
    import deepspeed

    _connect(world)
    if world.device.type == "cpu":
        # Its shared-memory exchange is for inference. It would be compiled now, for minutes, and a run killed meanwhile
        # leaves a lock on which the next one waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _connect(world: World) -> None:
    """A process group also for one process alone, which has none, and the environment that a launcher gives."""
    if not distributed.is_initialized():
        assert world.processes == 1
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        backend = distributed.get_default_backend_for_device(world.device)
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def world_text(recipe: Recipe, world: World, model: nn.Module, numbers: int) -> str:
    """What runs where, in plain words, before the first step; `numbers` are learned."""
    # A weight in shards is empty until it is used, and says its size elsewhere.
    sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if not p.requires_grad]
    count = "1 process" if world.processes == 1 else f"{world.processes} processes"
    rows = f"{recipe.train.batch_size} rows a step" + (f" shared by {world.groups}" if world.groups > 1 else "")
    parts = f", each row in {world.sequence} parts" if world.sequence > 1 else ""
    by = "DeepSpeed's ZeRO-3" if recipe.runtime.zero == 3 else "FSDP2"
    waiting = ", waiting in the CPU's memory" if recipe.runtime.offload == "cpu" else ""
    shards = (
        f"in {world.processes} shard{'s'[: world.processes - 1]} ({by}){waiting}"
        if recipe.sharded()
        else "whole in each process"
    )
    clip = f"clipped at {recipe.train.clip:g}" if recipe.train.clip else "not clipped"
    slow = slow_dtype(recipe.base.dtype, world.device.type)
    return (
        f"{count} on {world.device.type}: {rows}{parts}\n"
        f"  frozen    {sum(sizes) / 2**30:.2f} GiB of {recipe.base.dtype} weights, {shards}\n"
        f"  learned   {numbers:,} float32 numbers, whole in each process; gradients summed over all, {clip}"
        + (f"\n  {slow}" if slow else "")
    )
