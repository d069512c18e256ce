"""The memory that `yarn-tune plan` predicts for a way of the step-cost part."""

from yarn_tune.models import BaseModel
from yarn_tune.planning import Shape, step_memory
from yarn_tune.recipe import Base, parse_recipe

from .context import Context

SETTINGS = {
    "kept": ["train.gradient_checkpointing=false"],
    "checkpointing": [],
    "attention kept": ["train.keep_attention=true"],
    "tiled MLPs": ["train.tiled_mlp=4096"],
    "offloaded": ["train.offload_activations=true"],
}
"""Way -> recipe settings; forwards and the hand-written loop are not planned."""


def predicted_mib(context: Context, way: str, length: int) -> float | None:
    """MiB of one step above the weights; None for a way that `plan` does not predict."""
    if way not in SETTINGS:
        return None
    base = BaseModel(Base(model=str(context.model)))
    tree = {
        "name": "planned",
        "base": {"model": str(context.model)},
        "rope": {"window": max(length, base.facts.native), "query_gains": "pair_phase"},
        "data": {"train": ["a"], "heldout": ["b"], "row_tokens": length},
    }
    recipe = parse_recipe(tree, SETTINGS[way])
    return step_memory(recipe, Shape.of(base.config), length) / 2**20
