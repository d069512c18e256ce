"""The learned numbers as a PEFT adapter."""

from .config import YarnTuneConfig
from .files import BESIDE, CONFIG, WEIGHTS, adapter_numbers, adapter_recipe, is_adapter, read_config, write_adapter
from .model import place_of

__all__ = [
    "BESIDE",
    "CONFIG",
    "WEIGHTS",
    "YarnTuneConfig",
    "adapter_numbers",
    "adapter_recipe",
    "is_adapter",
    "place_of",
    "read_config",
    "write_adapter",
]
