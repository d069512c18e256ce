"""Questions planted in training rows: a number stated somewhere in the text and asked for at the row's end.

Prose rewards near context most of all, and what is learned from it alone can unlearn to look far back. Rows with a
question keep (or teach) that. They are the prompts of `retrieval.py`, with other words, numbers and places than any
measurement has, made from the training documents, with the answer behind.
"""

import random
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models import IGNORED
from ..recipe import Recipe
from .positions import Placed
from .prompts import WORDINGS, answer_tokens, build_prompt
from .rows import RowSet

FIRST_SEED = 1_000_000
"""Measurements count their prompts from zero."""


def plant_needles(rows: RowSet, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowSet:
    """The rows, a share `data.needles` of them with a question; which ones is a function of the recipe's seed.

    Raises:
        UserError: if rows are too short for a question.
    """
    if recipe.data.needles == 0:
        return rows
    rng, special = random.Random(f"needles/{recipe.train.seed}"), set(tokenizer.all_special_ids)
    chosen = set(rng.sample(range(len(rows.rows)), round(recipe.data.needles * len(rows.rows))))
    planted = [
        _asking(row, recipe, tokenizer, special, FIRST_SEED + number, rng.random()) if number in chosen else row
        for number, row in enumerate(rows.rows)
    ]
    return replace(rows, rows=planted)


def _asking(
    row: Placed, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, special: set[int], seed: int, depth: float
) -> Placed:
    """A row of the same length that ends in a question and its answer."""
    wording, size = WORDINGS[recipe.data.wording], len(row.input_ids)
    # Twice, since without its special tokens the text may be too short to fill a row with needle and question.
    prose = [token for token in row.input_ids * 2 if token not in special]
    try:
        answer = answer_tokens(tokenizer, seed, wording)
        prompt = build_prompt(tokenizer, prose, size - answer, depth, 1, seed, wording)
    except UserError as error:
        raise UserError(f"data.needles: {error}") from error
    ids = [*prompt.ids, *prompt.answer_ids]
    return Placed(ids, list(range(size)), [*ids[1:], IGNORED], answers=answer)
