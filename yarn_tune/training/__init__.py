"""The training loop, its batches, objective, teacher and optimizer."""

from .batches import collate
from .loop import train
from .objective import Lesson, Objective
from .teacher import windows

__all__ = ["Lesson", "Objective", "collate", "train", "windows"]
