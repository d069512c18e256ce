"""The training loop, its batches, objective, teacher and optimizer."""

from .batches import collate, split_rows
from .loop import train
from .objective import Objective, ObjectiveConfig
from .teacher import windows

__all__ = ["Objective", "ObjectiveConfig", "collate", "split_rows", "train", "windows"]
