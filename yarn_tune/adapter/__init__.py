"""The learned numbers as a PEFT adapter."""

from .config import YarnTuneConfig
from .files import (
    BESIDE,
    CONFIG,
    WEIGHTS,
    AdapterSections,
    adapter_numbers,
    is_adapter,
    read_config,
    read_sections,
    write_adapter,
)
from .layer import place_of
from .model import YarnTuneModel

__all__ = [
    "BESIDE",
    "CONFIG",
    "WEIGHTS",
    "AdapterSections",
    "YarnTuneConfig",
    "YarnTuneModel",
    "adapter_numbers",
    "is_adapter",
    "place_of",
    "read_config",
    "read_sections",
    "write_adapter",
]
