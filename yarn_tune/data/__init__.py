"""Documents, packing into rows, positions, planted retrieval questions, and held-out excerpts."""

from .heldout import check_heldout, excerpt_lengths, grid_lengths, heldout_excerpts, heldout_tokens
from .needles import PLAIN, TASKS, WORDINGS, Prompt, PromptSpec, Wording, plant_needles, prompt_of
from .packing import Account, pack_long
from .positions import Coverage, Placed, place_contiguous
from .rows import RowRequest, RowSet, build_rows, build_rows_apart, has_several

__all__ = [
    "PLAIN",
    "TASKS",
    "WORDINGS",
    "Account",
    "Coverage",
    "Placed",
    "Prompt",
    "PromptSpec",
    "RowRequest",
    "RowSet",
    "Wording",
    "build_rows",
    "build_rows_apart",
    "check_heldout",
    "excerpt_lengths",
    "grid_lengths",
    "has_several",
    "heldout_excerpts",
    "heldout_tokens",
    "pack_long",
    "place_contiguous",
    "plant_needles",
    "prompt_of",
]
