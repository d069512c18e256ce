"""Held-out documents as they are measured on: excerpts to read, prose to hide needles in; checked before training."""

import torch
from torch import Tensor

from ..errors import UserError
from ..models import BaseModel
from ..recipe import HUB, Data, Eval, Retrieve
from .documents import tokenized
from .needles import WORDINGS, build_prompt

ROOM = 16
"""Tokens left of a window for the answer to a planted question."""
HELDOUT_FILLER = 2_000_000
"""Tokens of a streamed dataset that are enough to hide needles in."""


def heldout_excerpts(
    data: Data, base: BaseModel, length: int, count: int, key: str = "data.heldout"
) -> list[tuple[str, Tensor]]:
    """Up to `count` excerpts of `length` tokens, `[length]` each, from the held-out documents in turn.

    The first excerpts are the documents' beginnings, the next ones what follows. Each comes with a label, and begins as
    the tokenizer lets a text begin.

    Args:
        data: the recipe's section.
        base: its tokenizer is used.
        length: tokens of an excerpt.
        count: most excerpts.
        key: recipe key whose documents are read, `data.heldout` or `data.heldout_unlike`.

    Raises:
        UserError: if no held-out document is long enough.
    """
    names = data.heldout_files()[key]
    documents = list(tokenized(data, key, names, base.tokenizer, enough=4 * count * length))
    excerpts: list[tuple[str, Tensor]] = []
    longest = max((len(document) for document in documents), default=0)
    for turn in range(longest // length):
        for number, document in enumerate(documents):
            span = document[turn * length : (turn + 1) * length]
            if len(span) == length and len(excerpts) < count:
                ids = torch.tensor([*base.prefix, *span[len(base.prefix) :]])
                excerpts.append((f"document {number + 1}, part {turn + 1}", ids))
    if not excerpts:
        raise UserError(
            f"{key}: the longest of {len(documents)} documents has {longest} tokens, fewer than the "
            f"{length} to be measured; add longer documents or lower eval.lengths"
        )
    return excerpts


def heldout_tokens(data: Data, base: BaseModel) -> list[int]:
    """All held-out documents, one after another, without special tokens: prose to hide needles in."""
    documents = tokenized(data, "data.heldout", data.heldout, base.tokenizer, HELDOUT_FILLER)
    special = set(base.tokenizer.all_special_ids)
    return [token for document in documents for token in document if token not in special]


def check_heldout(data: Data, evaluation: Eval, base: BaseModel, native: int, window: int) -> None:
    """Refuse held-out files that `compare` could not measure on, before anything is learned.

    Datasets on the hub are not read for it, since no cache keeps them.

    Raises:
        UserError: if files are missing or unreadable, if no document is as long as the longest length measured, or if
            the shortest or longest prompt of `eval.retrieval` cannot be made of them.
    """
    local = {key: names for key, names in data.heldout_files().items() if not any(n.startswith(HUB) for n in names)}
    for key, names in local.items():
        if names:
            heldout_excerpts(data, base, max(evaluation.lengths or [window]), 1, key)
    if "data.heldout" in local and (wanted := evaluation.retrieval):
        filler = heldout_tokens(data, base)
        lengths = grid_lengths(wanted, native, window)
        try:
            for length in (lengths[0], lengths[-1]):
                build_prompt(base.tokenizer, filler, length, 0.0, wanted.keys, 0, WORDINGS[wanted.wording])
        except UserError as error:
            raise UserError(f"eval.retrieval: {error}") from error


def grid_lengths(wanted: Retrieve, native: int, window: int) -> list[int]:
    """The recipe's lengths; or the native window doubled up to the window, each less the room for an answer."""
    return sorted(set(wanted.lengths or [length - ROOM for length in doubled(native, window)]))


def doubled(native: int, window: int) -> list[int]:
    """The native window, twice it, and so on below the window; and the window."""
    lengths = [native]
    while lengths[-1] * 2 < window:
        lengths.append(lengths[-1] * 2)
    return [*lengths, window]
