"""The exported checkpoint, its comparison with memory, its pages, the hub, and GGUF."""

from .checkpoint import export
from .gguf import convert
from .hub import prepare_upload, upload
from .model_card import write_card
from .serving_page import difference_text

__all__ = ["convert", "difference_text", "export", "prepare_upload", "upload", "write_card"]
