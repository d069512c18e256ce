"""The exported checkpoint, its comparison with memory, its pages, the hub, and GGUF."""

from .checkpoint import export, export_overrides
from .fidelity import Fidelity, difference_text, prompt_lengths
from .gguf import convert
from .hub import prepare_upload, upload

__all__ = [
    "Fidelity",
    "convert",
    "difference_text",
    "export",
    "export_overrides",
    "prepare_upload",
    "prompt_lengths",
    "upload",
]
