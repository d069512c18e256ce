"""AdamW over the trainable parameters, one group per kind, and the schedule of the learning rates."""

import math

import torch

from ..recipe import Rope, Train
from ..tunable import TunableRotary, decay_of, rate_of


def make_optimizer(rotary: TunableRotary, train: Train) -> torch.optim.Optimizer:
    """AdamW over the trainable offsets; weight decay pulls them to zero, which is search-free YaRN."""
    groups = [
        {"params": members, "name": kind, "weight_decay": decay_of(kind, train)}
        for kind, members in rotary.parameter_groups().items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to a tenth of the peak."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, train: Train, rope: Rope, step: int) -> None:
    """Set the learning rate of every group for a step."""
    share = rate_share(step, train.steps, train.warmup)
    for group in optimizer.param_groups:
        group["lr"] = share * rate_of(group["name"], train, rope)
