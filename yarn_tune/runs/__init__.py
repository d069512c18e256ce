"""The run folder: recipe, checkpoints, metrics, learned parameters, and earlier runs to start from."""

from .checkpoint import (
    State,
    check_inputs,
    checkpoints,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    read_state,
    save_state,
)
from .decision import Candidate, Decision, check_worth_serving, read_decision, write_decision
from .folder import AdapterRun, Run, check_folder, claimed, recorded_base
from .initial import previous_run
from .learned import TunedRow, is_complete, learned_of, tuned_row, write_learned
from .metrics import EARLIER, MetricsLog, end_training, read_metrics, training_costs

__all__ = [
    "EARLIER",
    "AdapterRun",
    "Candidate",
    "Decision",
    "MetricsLog",
    "Run",
    "State",
    "TunedRow",
    "check_folder",
    "check_inputs",
    "check_worth_serving",
    "checkpoints",
    "claimed",
    "end_training",
    "is_complete",
    "latest_state",
    "learned_of",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "previous_run",
    "read_decision",
    "read_metrics",
    "read_state",
    "recorded_base",
    "save_state",
    "training_costs",
    "tuned_row",
    "write_decision",
    "write_learned",
]
