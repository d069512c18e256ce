"""The trainable parameters: the rotary module, query gains and phases, LoRA, and folding into weights."""

from .folding import Folded, fold_checkpoint, fold_parameters
from .lora import NO_LORA, PREFIX, Factors, LoraSize, lora_config, lora_size, merge_checkpoint, with_lora
from .parameters import Learned, Start
from .query_gains import FollowedQueries, gains_for
from .replacement import RotaryProxy, move_only
from .rotary import TunableRotary, at_start, attach, attach_fixed, base_model_active, detach

__all__ = [
    "NO_LORA",
    "PREFIX",
    "Factors",
    "Folded",
    "FollowedQueries",
    "Learned",
    "LoraSize",
    "RotaryProxy",
    "Start",
    "TunableRotary",
    "at_start",
    "attach",
    "attach_fixed",
    "base_model_active",
    "detach",
    "fold_checkpoint",
    "fold_parameters",
    "gains_for",
    "lora_config",
    "lora_size",
    "merge_checkpoint",
    "move_only",
    "with_lora",
]
