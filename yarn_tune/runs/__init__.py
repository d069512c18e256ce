"""The run folder: recipe, checkpoints, metrics, learned numbers, and earlier runs to start from."""

from .checkpoint import State, latest_state, load_optimizer_tensors, optimizer_tensors, save_state
from .folder import Run, claimed
from .initial import earlier_of
from .learned import Tuned, learned_of, tuned_of, write_learned
from .metrics import EARLIER, MetricsLog, end_training, progress_text, taught

__all__ = [
    "EARLIER",
    "MetricsLog",
    "Run",
    "State",
    "Tuned",
    "claimed",
    "earlier_of",
    "end_training",
    "latest_state",
    "learned_of",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "progress_text",
    "save_state",
    "taught",
    "tuned_of",
    "write_learned",
]
