"""Preparation of a run: load the frozen model, attach the learned numbers, and apply the memory settings."""

from transformers import PreTrainedModel

from ..distributed import Sharding, World, check_weights, checkpoint_layers, loading, offload_inputs, tile_mlps
from ..models import BaseModel, switch_off_dropout
from ..recipe import Recipe
from ..tunable import TunableRotary, attach


def sharding_of(recipe: Recipe) -> Sharding:
    """How the recipe distributes the frozen weights and the rows."""
    return Sharding(recipe.runtime, recipe.base.dtype, recipe.train.micro_batch_size)


def prepare(
    recipe: Recipe, base: BaseModel, world: World, begin: TunableRotary
) -> tuple[PreTrainedModel, TunableRotary]:
    """Load the frozen model, attach the learned numbers at their start, and apply the recipe's memory settings.

    Args:
        recipe: the recipe of the run.
        base: its base model.
        world: the processes that share the model.
        begin: the learned numbers without a model (`tunable.at_start`).

    Raises:
        CheckFailed: if the weights were loaded in another dtype than the recipe's.
    """
    sharding, train = sharding_of(recipe), recipe.train
    with loading(sharding, world):
        model = base.load()
    if not sharding.sharded:
        model.to(world.device)  # type: ignore[arg-type]
    check_weights(model, recipe.base.dtype)
    switch_off_dropout(model)
    rotary = attach(model, begin.start, begin.frequencies, begin.adjustments, recipe.lora).to(world.device)
    if train.gradient_checkpointing:
        checkpoint_layers(model, train.keep_attention)
    if train.offload_activations:
        offload_inputs(model, world.device.type)
    if train.tiled_mlp is not None:
        tile_mlps(model, train.tiled_mlp)
    model.train()
    return model, rotary
