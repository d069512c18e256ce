"""AdamW over the learned offsets, and the schedule of their learning rates."""

import math

import torch

from ..recipe import Recipe
from ..tunable import TunableRotary


def make_optimizer(rotary: TunableRotary, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the learned offsets; weight decay pulls them to zero, which is search-free YaRN."""
    decays = recipe.train.decays()
    groups = [
        {"params": members, "name": kind, "weight_decay": getattr(decays, kind)}
        for kind, members in rotary.parameter_groups().items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to a tenth."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Give each kind of number its rate for this step."""
    share = rate_share(step, recipe.train.steps, recipe.train.warmup)
    rates = recipe.train.rates(recipe.rope.query_gains)
    for group in optimizer.param_groups:
        group["lr"] = share * getattr(rates, group["name"])
