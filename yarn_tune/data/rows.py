"""From the documents a recipe names (`documents.py`) to rows for training."""

import os
import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models import bos_of
from ..recipe import Recipe, matching_files
from .documents import tokenized
from .packing import Packed, pack_concat, pack_long
from .positions import Coverage, Placed, coverage, place_contiguous


@dataclass(frozen=True)
class RowSet:
    """The rows of a run, in a fixed order, with an account of them."""

    rows: list[Placed]
    packed: Packed
    available: int
    """Rows the documents would have given."""
    bos: int | None = None
    """What every row begins with, in place of its first token, where the tokenizer puts a token before a text."""

    def batch(self, step: int, batch_size: int, seed: int) -> list[Placed]:
        """The rows of one step. A function of its arguments alone, so that a resumed run reads on exactly.

        Rows are shuffled anew for every pass over them.
        """
        chosen = []
        for slot in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(slot, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            chosen.append(self.rows[order[place]])
        return chosen

    def coverage(self, window: int, lengths: list[int] | None = None) -> Coverage:
        """Which relative distances these rows train: whole, or cut to each of `lengths` (`data.lengths`)."""
        return coverage((piece for n in lengths or [window] for row in self.rows for piece in row.pieces(n)), window)


def build_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowSet:
    """Tokenize, pack and place the training documents.

    Raises:
        UserError: if files are missing or unreadable, hold too little text for one row, or are held out too.
    """
    _check_apart(recipe)
    row_tokens, wanted = recipe.row_tokens(), recipe.rows()
    enough, bos = 2 * wanted * row_tokens, bos_of(tokenizer)
    documents = list(tokenized(recipe, "data.train", recipe.data.train, tokenizer, enough))
    filler = tokenizer.eos_token_id or 0
    pack = pack_long if recipe.data.packing == "long" else pack_concat
    packed = pack(documents, row_tokens, filler)
    usable = [row for row in packed.rows if row.padding == 0]
    if packed.tokens < row_tokens:
        raise UserError(
            f"data.train: {packed.tokens} tokens in {packed.documents} documents do not fill one row of "
            f"{row_tokens}; add documents or lower data.row_tokens"
        )
    rng = random.Random(recipe.train.seed)
    whole = packed.whole_rows
    # Rows out of one document are the better teachers of distance: they come first when not all are needed.
    order = [*rng.sample(range(whole), whole), *rng.sample(range(whole, len(usable)), len(usable) - whole)]
    return RowSet([place_contiguous(usable[i]).with_bos(bos) for i in order[:wanted]], packed, len(usable), bos)


def _check_apart(recipe: Recipe) -> None:
    """Refuse files that are trained on and held out, under whatever names."""
    train, heldout = (
        {os.path.realpath(path) for name in names for path in matching_files(name)}
        for names in (recipe.data.train, recipe.data.heldout)
    )
    if both := sorted(train & heldout):
        raise UserError(
            f"data.heldout: {', '.join(both)} is among the files of data.train too; measuring on training documents "
            "says nothing: name other documents"
        )
