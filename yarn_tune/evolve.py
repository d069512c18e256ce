"""`rope.learn: search`: the factors by evolutionary search, judged on the training rows, without a gradient.

The algorithm is in `search.py`; here its candidates meet the model. Each is judged by its mean nats on the first
`train.search.rows` training rows, in forward passes only. The attention factor stays search-free YaRN's, as published.
The result is saved as a gradient run's would be, so that comparison and export are the same.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .adapter import place_of
from .batches import collate
from .checkpoint import write_atomically, write_json
from .data import build_rows
from .errors import UserError
from .heldout import check_heldout
from .learned import Learned, Start
from .metrics import end_training
from .models import load_model, load_tokenizer
from .objectives import NextToken
from .runtime import environment, start
from .search import SearchState, Settings, initial_factors, search
from .serving.profiles import Target, settle
from .train import Run, claimed, train, write_learned
from .tunable import at_start, attach_fixed

HEADROOM = 1.25
"""Candidates may stretch a pair by up to this times window / native, as published."""


def learn(run: Run) -> Learned:
    """By gradient or by search, as the recipe says; raises as `train` does."""
    return evolve(run) if run.recipe.rope.learn == "search" else train(run)


def evolve(run: Run) -> Learned:
    """Search the factors, from the start or from the last generation saved.

    Raises:
        UserError: if the recipe, the base or the documents do not allow it.
    """
    recipe = run.recipe
    target = Target.of_recipe(recipe)
    rotary = at_start(recipe)
    begin = rotary.start
    settle(rotary.learned(), target)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    check_heldout(recipe, tokenizer, begin.native)
    rows = build_rows(recipe, tokenizer)
    world = start(recipe, run.folder)
    if world.processes > 1:
        raise UserError(f"rope.learn: search runs in one process, {world.processes} were started")
    with claimed(run, world):
        write_json(run.folder / "environment.json", environment(world))
        model = load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype).to(world.device)  # type: ignore[arg-type]
        judge = Judge(model, begin, [collate([row], world.device) for row in rows.rows[: recipe.train.search.rows]])
        state = _search(run, begin, judge)
        rotary.load_numbers(offsets_of(state.best, begin))
        learned = settle(rotary.learned(), target)
        write_learned(run, rotary, learned, place_of(model))
    end_training(world)
    return learned


class Judge:
    """Mean nats of candidates on a few rows."""

    def __init__(self, model: PreTrainedModel, begin: Start, batches: list[dict[str, Tensor]]) -> None:
        self.begin, self.batches = begin, batches
        self.tokens = sum(batch["input_ids"].numel() for batch in batches)
        """Forward tokens a candidate."""
        self._table: tuple[Tensor, float] = (begin.inv_freq(), begin.attention_factor)
        attach_fixed(model, lambda length: self._table)
        self._objective = NextToken(model)

    @torch.no_grad()
    def __call__(self, factors: list[float]) -> float:
        """Nats per token under these factors."""
        self._table = (self.begin.divided(factors), self._table[1])
        total = sum(self._objective(**batch).item() for batch in self.batches)
        targets = sum(int((batch["labels"] >= 0).sum()) for batch in self.batches)
        return total / targets if math.isfinite(total) else math.inf


def offsets_of(factors: list[float], begin: Start) -> dict[str, Tensor]:
    """A candidate as the offsets from search-free YaRN that a gradient run would have learned."""
    offsets = torch.log(begin.inv_freq().double() / begin.divided(factors).double())
    return {"offsets.log_factor": offsets.float(), "log_temperature": torch.zeros(1)}


def _search(run: Run, begin: Start, judge: Judge) -> SearchState:
    """All generations, each saved with a line in metrics.jsonl."""
    chosen = run.recipe.train.search
    settings = Settings(
        population=chosen.population,
        generations=chosen.generations,
        mutations=chosen.mutations,
        crossovers=chosen.crossovers,
        parents=chosen.parents,
        seed=run.recipe.train.seed,
    )
    path, metrics = run.checkpoints / "search.json", run.folder / "metrics.jsonl"
    state = SearchState.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    lines: list[dict[str, Any]] = []
    if state is not None and metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()][: state.generation + 1]
    bar = tqdm(total=settings.generations, initial=len(lines), unit="generation", file=sys.stderr)
    clock = [time.monotonic(), float(state.evaluations if state else 0)]

    def save_generation(now: SearchState) -> None:
        tokens = int(now.evaluations - clock[1]) * judge.tokens
        seconds = round(time.monotonic() - clock[0], 3)
        clock[:] = [time.monotonic(), float(now.evaluations)]
        best = {"slowest_factor": now.best[-1], "largest_factor": max(now.best)}
        lines.append({"step": now.generation, "loss": now.best_fitness, "tokens": tokens, "seconds": seconds,
                      "learned": best, "factors": now.best})  # fmt: skip
        # The line first: killed between the two, the generation is done again and its line with it.
        write_atomically(metrics, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        write_atomically(path, now.to_json().encode())
        bar.update()
        bar.set_postfix_str(f"best {now.best_fitness:.4f} nats")

    fitness: Callable[[list[float]], float] = judge
    upper = HEADROOM * begin.stretch
    return search(fitness, initial_factors(begin), upper, settings, state, save_generation)
