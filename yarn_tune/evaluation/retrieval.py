"""Measure retrieval: whether a model finds a number stated in prose, by prompt length and depth.

A prompt is prose in which one sentence (or several, for different words) states a number; it ends with a question about
one of the numbers. An answer is right when greedy decoding gives exactly its tokens. Lengths and positions are in
tokens; a depth is the share of the prose before the needle, from 0.0 (far from the question) to 1.0 (right before it).
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import math
import random
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data import PLAIN, TASKS, WORDINGS, Prompt, PromptSpec, Wording, prompt_of
from ..errors import UserError
from ..files import read_checked, write_checked
from ..models import hidden_states, logit_transform
from ..recipe import Retrieve
from .methods import Method
from .nll_cache import NllCache, shared_path


def score_transformers(model: PreTrainedModel, prompt: Prompt) -> bool:
    """Whether greedy decoding gives the answer: one forward pass, logits `[answer, vocab]` only."""
    # Greedy decoding gives the answer exactly if each of its tokens is the likeliest one after the tokens before it.
    return _likeliest(model, prompt.ids, prompt.answer_ids) == prompt.answer_ids


def greedy_answer(model: PreTrainedModel, prompt: Prompt) -> list[int]:
    """As many tokens as the answer has, by greedy decoding; one forward pass where they are the answer."""
    draft, right = list(prompt.answer_ids), 0
    while right < len(draft):
        found = _likeliest(model, prompt.ids, draft)
        # Tokens up to and including the first that differs from the draft follow right ones, so they are right too.
        while right < len(draft) and found[right] == draft[right]:
            right += 1
        draft, right = [*draft[:right], *found[right:]], right + 1
    return draft


@torch.no_grad()
def answer_logits(model: PreTrainedModel, ids: list[int], answer: list[int]) -> Tensor:
    """Logits of each token of an answer, after the prompt and the tokens before it; float32 `[answer, vocab]`."""
    given = torch.tensor([[*ids, *answer[:-1]]], device=model.device)
    hidden = hidden_states(model, given)[0, -len(answer) :]
    logits, transform = model.get_output_embeddings()(hidden).float(), logit_transform(model.config)
    return transform(logits) if transform else logits


def _likeliest(model: PreTrainedModel, ids: list[int], answer: list[int]) -> list[int]:
    """The likeliest token in the place of each token of an answer, after the tokens before it."""
    likeliest: list[int] = answer_logits(model, ids, answer).argmax(-1).tolist()
    return likeliest


def score_server(client_url: str, model_name: str, prompt: Prompt, timeout: float = 600.0) -> bool:
    """Whether an OpenAI-compatible server, sent the prompt's token ids, gives the answer.

    `client_url` is as `http://localhost:8000`, with or without `/v1`; `timeout` is in seconds.

    Raises:
        UserError: if the server cannot be reached, refuses, or answers with something else than a completion.
    """
    url = f"{client_url.rstrip('/').removesuffix('/v1')}/v1/completions"
    body = {"model": model_name, "prompt": prompt.ids, "max_tokens": len(prompt.answer_ids), "temperature": 0}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return str(json.load(response)["choices"][0]["text"]).strip() == prompt.answer
    except urllib.error.HTTPError as error:
        answer = f"status {error.code}: {error.read().decode(errors='replace').strip()[:300]}"
        remedy = f"is {model_name!r} served there, with room for {len(prompt.ids)} tokens and the answer?"
        raise UserError(f"{url}: the server refused ({answer}); {remedy}") from error
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        remedy = "start an OpenAI-compatible server, for example `vllm serve CHECKPOINT`, or correct the address"
        raise UserError(f"{url}: no completion came back ({error!r}); {remedy}") from error


def wilson(right: int, asked: int) -> tuple[float, float, float]:
    """The share of right answers and its Wilson 95% interval `(share, low, high)`; `(nan, 0, 1)` without prompts."""
    if not asked:
        return float("nan"), 0.0, 1.0
    share, spread = right / asked, 1.959964**2 / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return share, max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Cell:
    """The prompts of one task, length and depth."""

    length: int
    """Tokens."""
    depth: float
    right: int
    """Prompts answered correctly."""
    asked: int
    task: str = "needle"


@dataclass(frozen=True)
class Retrieval:
    """The results on a grid of prompt lengths and depths."""

    cells: list[Cell]

    def accuracy(self, length: int | None = None, beyond: int | None = None) -> tuple[float, float, float]:
        """Share of right answers with its Wilson 95% interval, `(share, low, high)`, each from 0 to 1.

        Only prompts of `length` tokens, or longer than `beyond` tokens, are counted where one is given.
        """
        chosen = [c for c in self.cells if length in (None, c.length) and (beyond is None or c.length > beyond)]
        return wilson(sum(cell.right for cell in chosen), sum(cell.asked for cell in chosen))

    def by_task(self) -> dict[str, "Retrieval"]:
        """The cells of each task, in the order of the grid."""
        names = dict.fromkeys(cell.task for cell in self.cells)
        return {name: Retrieval([cell for cell in self.cells if cell.task == name]) for name in names}

    def prompts(self, beyond: int = 0) -> int:
        """Number of prompts longer than `beyond` tokens."""
        return sum(cell.asked for cell in self.cells if cell.length > beyond)

    def shares(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Lengths, depths, and the share right of each depth (row) and length (column), NaN without prompts."""
        lengths, depths = sorted({c.length for c in self.cells}), sorted({c.depth for c in self.cells})
        counts = {(length, depth): (0, 0) for length in lengths for depth in depths}
        for c in self.cells:
            right, asked = counts[c.length, c.depth]
            counts[c.length, c.depth] = (right + c.right, asked + c.asked)
        return lengths, depths, [[wilson(*counts[length, depth])[0] for length in lengths] for depth in depths]


@dataclass(frozen=True)
class RetrievalGrid:
    """The prompts of a measurement.

    Raises:
        UserError: if there are no prompts, or a task is unknown.
    """

    lengths: list[int]
    """Tokens per prompt."""
    depths: list[float]
    per_cell: int
    """Prompts per length and depth."""
    keys: int = 1
    """Needles per prompt, each for another word; the question is about one of them."""
    wording: Wording = field(default=PLAIN)
    seed: int = 0
    tasks: tuple[str, ...] = ("needle",)

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or self.per_cell < 1:
            raise UserError("retrieval: name at least one length and one depth, and at least 1 prompt per cell")
        known = ("needle", *TASKS)
        unknown = [task for task in self.tasks if task not in known]
        if unknown or not self.tasks:
            raise UserError(f"retrieval tasks: of {', '.join(known)}; found {', '.join(unknown) or 'none'}")

    @classmethod
    def of(cls, settings: Retrieve, lengths: list[int]) -> "RetrievalGrid":
        """The grid of a recipe's `eval.retrieval`."""
        wording, tasks = WORDINGS[settings.wording], tuple(settings.tasks)
        return cls(lengths, settings.depths, settings.per_cell, settings.keys, wording, tasks=tasks)

    def specs(self) -> list[PromptSpec]:
        """Every prompt, task by task and shortest first; those of a cell do not depend on the other cells."""
        lengths, depths = sorted(set(self.lengths)), sorted(set(map(float, self.depths)))
        return [
            PromptSpec(
                task=task,
                length=length,
                depth=depth,
                seed=random.Random(f"{self.seed}/{length}/{depth}/{number}").randrange(2**31),
                keys=self.keys,
                wording=self.wording,
            )
            for task, length, depth, number in itertools.product(self.tasks, lengths, depths, range(self.per_cell))
        ]


def retrieve(
    score: Callable[[Prompt], bool],
    tokenizer: Tokenizer,
    filler: list[int],
    grid: RetrievalGrid,
    progress: str | None = "needles",
) -> Retrieval:
    """Score every prompt of a grid.

    Args:
        score: function that returns whether a prompt is answered correctly.
        tokenizer: tokenizer of the model.
        filler: token ids of the prose around the needles, as for `prompt_of`.
        grid: the prompts.
        progress: title of a progress bar on stderr; None: no bar.

    Raises:
        UserError: as `prompt_of`.
    """
    counts: dict[tuple[str, int, float], tuple[int, int]] = {}
    for spec in tqdm(grid.specs(), desc=progress, unit="prompt", file=sys.stderr, disable=not progress):
        right, asked = counts.get((spec.task, spec.length, spec.depth), (0, 0))
        found = score(prompt_of(tokenizer, filler, spec))
        counts[spec.task, spec.length, spec.depth] = (right + found, asked + 1)
    return Retrieval([Cell(length, depth, *count, task) for (task, length, depth), count in counts.items()])


@dataclass(frozen=True)
class RetrievalRecord:
    """A method's entry in retrieval.json: its result, and a hash of everything the result depends on."""

    key: str
    retrieval: Retrieval


def load_records(path: Path) -> dict[str, RetrievalRecord]:
    """Method -> entry of a retrieval.json; empty where there is no undamaged file."""
    try:
        tree = read_checked(path, "it is measured again")
        return {
            method: RetrievalRecord(entry["key"], Retrieval([Cell(**cell) for cell in entry["cells"]]))
            for method, entry in tree.items()
        }
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def save_records(path: Path, records: dict[str, RetrievalRecord]) -> None:
    """Write a retrieval.json."""
    tree = {m: {"key": r.key, "cells": [asdict(cell) for cell in r.retrieval.cells]} for m, r in records.items()}
    write_checked(path, tree)


def retrieve_methods(
    cache: NllCache,
    methods: dict[str, Method],
    filler: list[int],
    grid: RetrievalGrid,
    path: Path,
    shared: Collection[str] = (),
) -> dict[str, Retrieval]:
    """Score the same prompts under every method; entries of `path` that are still valid are not measured again.

    Args:
        cache: cache of the base; its model is loaded if a result is missing.
        methods: name -> method.
        filler: prose around the needles.
        grid: the prompts.
        path: the run's retrieval.json.
        shared: names of methods that do not depend on the run; their results are kept for other runs too.
    """
    known = load_records(path)
    tokenizer = cache.base.tokenizer
    for name, method in methods.items():
        key = _key(cache, method, filler, grid)
        if name in known and known[name].key == key:
            continue
        facts = json.dumps([key, cache.base.digests["tokenizer of the base"]])
        kept = shared_path("retrieval", facts, "json") if name in shared else None
        record = load_records(kept).get(key) if kept else None
        if record is None:
            with method.on(cache.model):
                found = retrieve(partial(score_transformers, cache.model), tokenizer, filler, grid, f"needles, {name}")
            record = RetrievalRecord(key, found)
            if kept:
                with contextlib.suppress(UserError):  # the cache cannot be written; the run folder has the result
                    save_records(kept, {key: record})
        known[name] = record
        save_records(path, known)
    return {name: known[name].retrieval for name in methods}


def _key(cache: NllCache, method: Method, filler: list[int], grid: RetrievalGrid) -> str:
    numbers = [method.key(length) for length in sorted(set(grid.lengths))]
    facts = [cache.base_key, repr(grid), numbers, filler]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def retrieval_table(retrieval: Retrieval) -> str:
    """A Markdown table of shares in %: one row per depth, one column per length, and the mean with its 95% interval.

    Where there are several tasks, each has a table of its own.
    """
    tasks = retrieval.by_task()
    if len(tasks) > 1:
        return "\n\n".join(f"{task}:\n\n{retrieval_table(found)}" for task, found in tasks.items())
    lengths, depths, shares = retrieval.shares()
    means = map(retrieval.accuracy, lengths)
    rows = [
        ["depth", *map(str, lengths)],
        ["---"] * (len(lengths) + 1),
        *([f"{depth:.0%}", *(f"{share:.0%}" for share in row)] for depth, row in zip(depths, shares, strict=True)),
        ["mean", *(f"{share:.0%} ({100 * low:.0f}-{100 * high:.0f})" for share, low, high in means)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
