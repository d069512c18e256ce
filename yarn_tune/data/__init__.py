"""Documents, packing into rows, positions, planted retrieval questions, and held-out excerpts."""

from .heldout import check_heldout, doubled, grid_lengths, heldout_excerpts, heldout_tokens
from .needles import plant_needles
from .packing import pack_long
from .positions import Coverage, Placed, place_contiguous
from .prompts import PLAIN, WORDINGS, Prompt, Wording, build_prompt
from .rows import RowSet, build_rows

__all__ = [
    "PLAIN",
    "WORDINGS",
    "Coverage",
    "Placed",
    "Prompt",
    "RowSet",
    "Wording",
    "build_prompt",
    "build_rows",
    "check_heldout",
    "doubled",
    "grid_lengths",
    "heldout_excerpts",
    "heldout_tokens",
    "pack_long",
    "place_contiguous",
    "plant_needles",
]
