"""Documents, packing into rows, positions, planted retrieval questions, and held-out excerpts."""

from .coverage import Coverage
from .heldout import check_heldout, doubled, grid_lengths, heldout_excerpts, heldout_tokens
from .needles import PLAIN, WORDINGS, Prompt, Wording, build_prompt, plant_needles
from .packing import pack_long
from .positions import Placed, place_contiguous
from .rows import RowRequest, RowSet, build_rows

__all__ = [
    "PLAIN",
    "WORDINGS",
    "Coverage",
    "Placed",
    "Prompt",
    "RowRequest",
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
