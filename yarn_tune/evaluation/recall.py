"""Retrieval beyond the native window: the grid of `retrieval.py` for the methods of a comparison."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ..data import WORDINGS, Prompt, grid_lengths, heldout_tokens
from ..files import write_json
from ..recipe import Retrieve
from ..runs import Run
from .methods import Method, NllCache
from .retrieval import Retrieval, retrieve, score_transformers


def retrieve_methods(run: Run, cache: NllCache, methods: dict[str, Method], native: int) -> dict[str, Retrieval]:
    """Ask every method the same prompts; what retrieval.json has from before is kept.

    Args:
        run: whose recipe has `eval.retrieval`.
        cache: of the recipe's base; its model is asked, and loaded if something is missing.
        methods: by name.
        native: the base's window.
    """
    recipe = run.recipe
    wanted = recipe.eval.retrieval
    assert wanted is not None
    filler = heldout_tokens(recipe.data, run.base)
    lengths = grid_lengths(wanted, native, recipe.rope.window)
    path = run.folder / "retrieval.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    keys = {method: _key(cache, wanted, how, lengths, filler) for method, how in methods.items()}
    for method, how in methods.items():
        if known.get(method, {}).get("key") != keys[method]:
            with how.on(cache.model):
                asked = ask(partial(score_transformers, cache.model), run.base.tokenizer, filler, lengths, wanted)
            known[method] = {"key": keys[method], "cells": asked.as_json()}
            write_json(path, known)
    return {method: of_json(known[method]["cells"]) for method in methods}


def ask(
    score: Callable[[Prompt], bool], tokenizer: Any, filler: list[int], lengths: list[int], wanted: Retrieve
) -> Retrieval:
    """One grid, with the settings of a recipe."""
    wording = WORDINGS[wanted.wording]
    return retrieve(score, tokenizer, filler, lengths, wanted.depths, wanted.per_cell, wanted.keys, 0, wording)


def of_json(cells: list[dict[str, Any]]) -> Retrieval:
    """The inverse of `Retrieval.as_json`."""
    return Retrieval({(cell["length"], cell["depth"]): (cell["right"], cell["asked"]) for cell in cells})


def _key(cache: NllCache, wanted: Retrieve, how: Method, lengths: list[int], filler: list[int]) -> str:
    tables = [how.facts(length) for length in lengths]
    facts = [cache.base_key, repr(wanted), lengths, tables, filler]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
