"""Held-out documents as they are measured on: excerpts to read, prose to hide needles in; checked before training."""

import itertools

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models import BaseModel
from ..recipe import HUB, Data, Eval, Retrieve
from .documents import Documents, Need, read_documents
from .needles import WORDINGS, PromptSpec, prompt_of
from .packing import Account, Tokens
from .tokenization import control_tokens

ROOM, ROOM_FOR_LISTS = 16, 48
"""Tokens left of a window for the answer to a question: for one number, and for several numbers or names."""
HELDOUT_FILLER = 2_000_000
"""Tokens of a streamed dataset that are enough to hide needles in."""


def heldout_excerpts(
    data: Data, base: BaseModel, length: int, count: int, key: str = "data.heldout", beginnings: bool = False
) -> list[tuple[str, Tensor]]:
    """Return up to `count` excerpts of `length` tokens, int64 `[length]` each, from the held-out documents in turn.

    The first excerpts are the documents' beginnings, the next ones what follows, unless only `beginnings` are taken.
    Each comes with a label, and begins with the tokenizer's prefix.

    Args:
        data: the recipe's section.
        base: its tokenizer is used.
        length: tokens of an excerpt.
        count: most excerpts.
        key: recipe key whose documents are read, `data.heldout` or `data.heldout_unlike`.
        beginnings: whether only the first `length` tokens of each document are taken.

    Raises:
        UserError: if no held-out document is long enough.
    """
    documents = list(_read(data, base, 4 * count * length, key))
    longest = max((len(document) for document in documents), default=0)
    spans = (
        (f"document {number}, part {turn + 1}", document[turn * length : (turn + 1) * length])
        for turn in range(1 if beginnings else longest // length)
        for number, document in enumerate(documents, 1)
        if len(document) >= (turn + 1) * length
    )
    prefix = torch.tensor(base.prefix, dtype=torch.int64)
    excerpts = [
        (label, torch.cat([prefix, torch.tensor(span[len(prefix) :], dtype=torch.int64)]))
        for label, span in itertools.islice(spans, count)
    ]
    if not excerpts:
        raise UserError(
            f"{key}: the longest of {len(documents)} documents has {longest} tokens, fewer than the "
            f"{length} to be measured; add longer documents or lower eval.lengths"
        )
    return excerpts


def heldout_tokens(data: Data, base: BaseModel) -> Tokens:
    """Return all held-out documents, one after another, without special tokens: prose to hide needles in."""
    documents = _read(data, base, HELDOUT_FILLER)
    tokens = np.concatenate([part for part, _ in documents.parts])
    return tokens[~np.isin(tokens, control_tokens(base))]


def check_heldout(data: Data, evaluation: Eval, base: BaseModel, native: int, window: int) -> dict[str, Account]:
    """Refuse held-out files that `compare` could not measure on, before anything is learned.

    Datasets on the hub are not read, since no cache keeps them.

    Returns:
        for each recipe key, what was found in its files.

    Raises:
        UserError: if files are missing or unreadable, if no document is as long as the longest length measured, or if
            the shortest or longest prompt of `eval.retrieval` cannot be made of them.
    """
    found: dict[str, Account] = {}
    for key, names in data.heldout_files().items():
        if names and not any(name.startswith(HUB) for name in names):
            heldout_excerpts(data, base, max(evaluation.lengths or [window]), 1, key)
            found[key] = _read(data, base, 0, key).account
    if "data.heldout" in found and (wanted := evaluation.retrieval):
        filler = heldout_tokens(data, base)
        lengths = grid_lengths(wanted, native, window)
        try:
            for task, length in itertools.product(wanted.tasks, (lengths[0], lengths[-1])):
                words = WORDINGS[wanted.wording]
                spec = PromptSpec(task=task, length=length, depth=0.0, seed=0, keys=wanted.keys, wording=words)
                prompt_of(base.tokenizer, filler, spec)
        except UserError as error:
            raise UserError(f"eval.retrieval: {error}") from error
    return found


def _read(data: Data, base: BaseModel, streamed: int, key: str = "data.heldout") -> Documents:
    """All files of a key; of a dataset on the hub, which may not end, `streamed` tokens."""
    names = data.heldout_files()[key]
    need = Need(streamed, 1) if any(name.startswith(HUB) for name in names) else None
    return read_documents(data, key, names, base, need)


def grid_lengths(wanted: Retrieve, native: int, window: int) -> list[int]:
    """The recipe's lengths; or the native window doubled up to the window, each less the room for an answer."""
    room = ROOM if wanted.tasks == ["needle"] else ROOM_FOR_LISTS
    return sorted(set(wanted.lengths or [length - room for length in doubled(native, window)]))


def doubled(native: int, window: int) -> list[int]:
    """The native window, twice it, and so on below the window; and the window."""
    lengths = [native]
    while lengths[-1] * 2 < window:
        lengths.append(lengths[-1] * 2)
    return [*lengths, window]
