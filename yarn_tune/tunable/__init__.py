"""The trainable parameters: the rotary module, query gains and phases, biases, LoRA, and folding into weights."""

from .attachment import FollowingHooks, attach, attach_fixed, base_model_active, detach, observe
from .folding import Folded, config_changes, fold_checkpoint, fold_parameters, set_parameters
from .kinds import KINDS, Kind, adjustments_for, decay_of, kinds_of, rate_of
from .lora import NO_LORA, PREFIX, Factors, LoraSize, lora_config, lora_size, merge_checkpoint, with_lora
from .parameters import Adjustment, Learned, Start, WeightFold
from .qk_bias import check_biased
from .query_gains import GainFold, gains_for
from .replacement import RotaryProxy, move_only
from .rotary import THETAS, TunableRotary, at_start, is_offset

__all__ = [
    "KINDS",
    "NO_LORA",
    "PREFIX",
    "THETAS",
    "Adjustment",
    "Factors",
    "Folded",
    "FollowingHooks",
    "GainFold",
    "Kind",
    "Learned",
    "LoraSize",
    "RotaryProxy",
    "Start",
    "TunableRotary",
    "WeightFold",
    "adjustments_for",
    "at_start",
    "attach",
    "attach_fixed",
    "base_model_active",
    "check_biased",
    "config_changes",
    "decay_of",
    "detach",
    "fold_checkpoint",
    "fold_parameters",
    "gains_for",
    "is_offset",
    "kinds_of",
    "lora_config",
    "lora_size",
    "merge_checkpoint",
    "move_only",
    "observe",
    "rate_of",
    "set_parameters",
    "with_lora",
]
