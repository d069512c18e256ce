"""Held-out documents: excerpts for perplexity and prose for retrieval prompts, both checked before training."""

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
"""Tokens of a window reserved for the answer to a question: one number, and several numbers or names."""
HELDOUT_FILLER = 2_000_000
"""Tokens of a streamed dataset to read as prose for retrieval prompts."""


def heldout_excerpts(
    data: Data, base: BaseModel, length: int, count: int, key: str = "data.heldout", beginnings: bool = False
) -> list[tuple[str, Tensor]]:
    """Return up to `count` excerpts of `length` tokens, int64 `[length]` each, from the held-out documents in turn.

    The first excerpts are the beginnings of the documents, and further ones are the next spans, unless `beginnings` is
    set. Each excerpt has a label, and begins with the tokenizer's prefix.

    Args:
        data: the recipe's section.
        base: the model whose tokenizer is used.
        length: tokens of an excerpt.
        count: largest number of excerpts.
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
    """Return all held-out documents, concatenated and without special tokens: prose for retrieval prompts."""
    documents = _read(data, base, HELDOUT_FILLER)
    tokens = np.concatenate([part for part, _ in documents.parts])
    return tokens[~np.isin(tokens, control_tokens(base))]


def check_heldout(data: Data, evaluation: Eval, base: BaseModel, native: int, window: int) -> dict[str, Account]:
    """Check before training that `compare` can measure on the held-out files.

    Datasets on the hub are not read, since no cache keeps them.

    Returns:
        the account of the files of each recipe key.

    Raises:
        UserError: if files are missing or unreadable, if no document is as long as the longest length measured, or if
            the shortest or longest prompt of `eval.retrieval` cannot be made from them.
    """
    found: dict[str, Account] = {}
    for key, names in data.heldout_files().items():
        if names and not any(name.startswith(HUB) for name in names):
            heldout_excerpts(data, base, max(evaluation.lengths or [window]), 1, key)
            found[key] = _read(data, base, 0, key).account
    if "data.heldout" in found and (retrieval := evaluation.retrieval):
        filler = heldout_tokens(data, base)
        lengths = grid_lengths(retrieval, native, window)
        try:
            for task, length in itertools.product(retrieval.tasks, (lengths[0], lengths[-1])):
                words = WORDINGS[retrieval.wording]
                spec = PromptSpec(task=task, length=length, depth=0.0, seed=0, keys=retrieval.keys, wording=words)
                prompt_of(base.tokenizer, filler, spec)
        except UserError as error:
            raise UserError(f"eval.retrieval: {error}") from error
    return found


def _read(data: Data, base: BaseModel, streamed: int, key: str = "data.heldout") -> Documents:
    """All documents of a key; of a dataset on the hub, which may be endless, the first `streamed` tokens."""
    names = data.heldout_files()[key]
    need = Need(streamed, 1) if any(name.startswith(HUB) for name in names) else None
    return read_documents(data, key, names, base, need)


def grid_lengths(retrieval: Retrieve, native: int, window: int) -> list[int]:
    """The recipe's lengths; or the native window doubled up to the window, each minus the tokens of an answer."""
    room = ROOM if retrieval.tasks == ["needle"] else ROOM_FOR_LISTS
    return sorted(set(retrieval.lengths or [length - room for length in doubled(native, window)]))


def excerpt_lengths(evaluation: Eval, native: int, window: int) -> list[int]:
    """The recipe's lengths of excerpts in tokens, or the native window doubled up to the window."""
    return sorted(set(evaluation.lengths or doubled(native, window)))


def doubled(native: int, window: int) -> list[int]:
    """The native window and its doublings below the window, followed by the window."""
    lengths = [native]
    while lengths[-1] * 2 < window:
        lengths.append(lengths[-1] * 2)
    return [*lengths, window]
