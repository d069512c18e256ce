"""Evolutionary search for RoPE factors, as published in LongRoPE (arXiv:2402.13753, section 3.2 and algorithm 1).

The defaults are the published settings: a first population of 64 (linear, NTK-aware and YaRN, and mutations of them),
40 generations of 16 mutations and 16 crossovers, the best 32 as parents, a mutation probability of 0.3 per factor,
factors from 1.0 to 1.25 times the extension ratio in steps of 0.01 that never fall from pair to pair, and perplexity as
fitness.

Differences from the paper: a mutated factor is drawn between its neighbours, so that factors never fall (the paper
draws again until they do not). The published search also chooses the number of first tokens that keep their positions;
here it is zero, since no stock checkpoint can represent it. No candidate is evaluated twice, since the fitness depends
only on the factors.

`searched` runs the search on a recipe's base: the fitness of a candidate is its mean NLL on the first training rows, in
forward passes only; the attention factor is that of search-free YaRN, as published. `search_vs_gradient.py` compares
the search with the gradient.

Shapes: factors are `[d/2]` divisors of the unscaled inverse frequencies. Fitness is in nats per token; lower is better.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from yarn_tune.data import RowRequest, build_rows
from yarn_tune.files import write_atomically
from yarn_tune.models import BaseModel, NextToken, load_model, to_device
from yarn_tune.recipe import Recipe
from yarn_tune.rope import longrope_inv_freq, ntk_inv_freq
from yarn_tune.training import collate
from yarn_tune.tunable import Start, attach_fixed

Factors = list[float]
Fitness = Callable[[Factors], float]
Birth = Callable[[random.Random], Factors]

ATTEMPTS = 100
"""Attempts to find one new candidate before the generation gets fewer, as published."""
HEADROOM = 1.25
"""Largest factor of a pair, as a multiple of window / native, as published."""


@dataclass(frozen=True)
class Settings:
    """The settings of the algorithm; the defaults are the published ones."""

    population: int = 64
    generations: int = 40
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    probability: float = 0.3
    """Probability that a mutation changes a factor."""
    step: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class SearchState:
    """The state of a search after a whole generation, from which it can continue."""

    generation: int
    """0 after the first population."""
    population: list[tuple[Factors, float]]
    """The parents of the next generation with their fitness, best first."""
    judged: dict[str, float]
    """Every candidate so far, as JSON, with its fitness."""
    history: list[tuple[int, float]]
    """(candidates judged, best fitness) after each generation."""
    random_state: Any

    @property
    def best(self) -> Factors:
        """The best factors so far."""
        return self.population[0][0]

    @property
    def best_fitness(self) -> float:
        """The fitness of the best factors."""
        return self.population[0][1]

    @property
    def evaluations(self) -> int:
        """Number of candidates judged."""
        return len(self.judged)

    def to_json(self) -> str:
        """The state as JSON, which `from_json` reads back exactly."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SearchState":
        """The state that `to_json` wrote."""
        saved = json.loads(text)
        version, numbers, gauss = saved["random_state"]
        return cls(
            saved["generation"],
            [(factors, fitness) for factors, fitness in saved["population"]],
            saved["judged"],
            [(count, fitness) for count, fitness in saved["history"]],
            (version, tuple(numbers), gauss),
        )


def initial_factors(start: Start) -> dict[str, Factors]:
    """Linear, NTK-aware and YaRN as divisors of the base's table, made to rise from pair to pair."""
    facts, factor = start.facts, start.stretch
    base = facts.table(start.window)[0].double()

    def divisors(table: Tensor) -> Factors:
        found: Factors = (base / table.double()).tolist()
        return [max(found[: i + 1]) for i in range(len(found))]

    return {
        "linear": [factor] * len(base),
        "ntk": divisors(start.over_base(ntk_inv_freq(facts.theta, facts.dim, factor))),
        "yarn": divisors(start.inv_freq()),
    }


def search(
    fitness: Fitness,
    seeds: dict[str, Factors],
    upper: float,
    settings: Settings,
    state: SearchState | None = None,
    on_generation: Callable[[SearchState], None] = lambda state: None,
) -> SearchState:
    """Run all generations, or those after `state`; the result does not depend on where it was interrupted.

    Args:
        fitness: nats per token of a candidate; NaN counts as infinitely bad.
        seeds: the first candidates by name, monotone and within 1 and `upper`.
        upper: largest factor.
        settings: settings of the algorithm.
        state: state to continue from.
        on_generation: called with the state after every generation.
    """
    if state is None:
        rng = random.Random(settings.seed)
        first = list(seeds.values())
        origins = [rng.choice(first) for _ in range(settings.population - len(first))]
        births: list[Birth] = [partial(_mutated, [origin], upper, settings) for origin in origins]
        newborn = _new(births, set(map(_key, first)), rng)
        state = _judged(0, [], [*first, *newborn], fitness, settings, {}, [], rng)
        on_generation(state)
    rng = random.Random()
    rng.setstate(state.random_state)
    for generation in range(state.generation + 1, settings.generations + 1):
        parents = [factors for factors, _ in state.population]
        births = [partial(_mutated, parents, upper, settings)] * settings.mutations
        births += [partial(_crossed, parents)] * settings.crossovers
        newborn = _new(births, set(state.judged), rng)
        state = _judged(generation, state.population, newborn, fitness, settings, state.judged, state.history, rng)
        on_generation(state)
    return state


def _key(factors: Factors) -> str:
    return json.dumps(factors)


def _new(births: list[Birth], known: set[str], rng: random.Random) -> list[Factors]:
    """One candidate per birth that is monotone and was not judged before; fewer if none is found."""
    found: list[Factors] = []
    for birth in births:
        for _ in range(ATTEMPTS):
            candidate = birth(rng)
            rising = all(a <= b for a, b in zip(candidate, candidate[1:], strict=False))
            if rising and _key(candidate) not in known:
                known.add(_key(candidate))
                found.append(candidate)
                break
    return found


def _judged(
    generation: int,
    parents: list[tuple[Factors, float]],
    newborn: list[Factors],
    fitness: Fitness,
    settings: Settings,
    judged: dict[str, float],
    history: list[tuple[int, float]],
    rng: random.Random,
) -> SearchState:
    """Judge the new candidates and keep the best of old and new as parents; returns the state after the generation."""
    values = {_key(factors): fitness(factors) for factors in newborn}
    values = {key: math.inf if math.isnan(value) else value for key, value in values.items()}
    everyone = [*parents, *((factors, values[_key(factors)]) for factors in newborn)]
    best = sorted(everyone, key=lambda one: one[1])[: settings.parents]
    judged = judged | values
    return SearchState(generation, best, judged, [*history, (len(judged), best[0][1])], rng.getstate())


def _mutated(parents: list[Factors], upper: float, settings: Settings, rng: random.Random) -> Factors:
    """A copy of a parent in which each factor, with a probability, is drawn again between its neighbours."""
    factors = rng.choice(parents)
    changed = list(factors)
    for i in range(len(changed)):
        if rng.random() < settings.probability:
            low = changed[i - 1] if i else 1.0
            high = factors[i + 1] if i + 1 < len(factors) else upper
            steps = range(math.ceil(low / settings.step), math.floor(high / settings.step) + 1)
            if steps:
                changed[i] = round(rng.choice(steps) * settings.step, 10)
    return changed


def _crossed(parents: list[Factors], rng: random.Random) -> Factors:
    """Each factor from one of two parents."""
    one, other = rng.sample(parents, 2)
    return [rng.choice(pair) for pair in zip(one, other, strict=True)]


def searched(recipe: Recipe, folder: Path, rows: int, settings: Settings | None = None) -> SearchState:
    """Search factors for a recipe's base on its first training rows, from the start or from the last generation saved.

    Args:
        recipe: names the base, the window and the documents.
        folder: folder of `search.json`, the state after each generation.
        rows: number of training rows that each candidate is judged on.
        settings: settings of the algorithm; None: as published.
    """
    begin = Start.of(BaseModel(recipe.base).facts, recipe.rope)
    request = RowRequest(recipe.row_tokens(), recipe.rows(), recipe.train.seed)
    read = build_rows(recipe.data, BaseModel(recipe.base), request).rows[:rows]
    model = to_device(load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype))
    judge = Judge(model, begin, [collate([row], model.device) for row in read])
    settings = settings or Settings()
    path = folder / "search.json"
    state = SearchState.from_json(path.read_text()) if path.is_file() else None
    folder.mkdir(parents=True, exist_ok=True)
    done = 0 if state is None else state.generation + 1
    bar = tqdm(total=settings.generations + 1, initial=done, unit="generation", file=sys.stderr)

    def save(now: SearchState) -> None:
        write_atomically(path, now.to_json().encode())
        bar.update()
        bar.set_postfix_str(f"best {now.best_fitness:.4f} nats")

    return search(judge, initial_factors(begin), HEADROOM * begin.stretch, settings, state, save)


class Judge:
    """Mean NLL of candidates on a few rows."""

    def __init__(self, model: PreTrainedModel, begin: Start, batches: list[dict[str, Tensor]]) -> None:
        self.begin, self.batches = begin, batches
        self._table: tuple[Tensor, float] = (begin.inv_freq(), begin.attention_factor)
        attach_fixed(model, lambda length: self._table)
        self._objective = NextToken(model)

    @torch.no_grad()
    def __call__(self, factors: Factors) -> float:
        """Mean NLL under these factors, in nats per token."""
        self._table = (divided(self.begin, factors), self._table[1])
        total = sum(self._objective(**batch).item() for batch in self.batches)
        targets = sum(int((batch["labels"] >= 0).sum()) for batch in self.batches)
        return total / targets if math.isfinite(total) else math.inf


def improvements(state: SearchState) -> dict[int, Factors]:
    """Candidates judged -> the best factors, after each generation that found better ones, and after the last."""
    judged, found, best = list(state.judged.items()), {}, None
    for count, fitness in state.history:
        if fitness != best or count == state.evaluations:
            best = fitness
            found[count] = json.loads(min(judged[:count], key=lambda one: one[1])[0])
    return found


def divided(begin: Start, factors: Factors) -> Tensor:
    """The base's own table with each pair divided by a factor, `[d/2]`."""
    if begin.facts.scaling is None:
        return longrope_inv_freq(begin.facts.theta, begin.facts.dim, factors)
    return begin.facts.table(begin.window)[0] / torch.tensor(factors)


def offsets_of(factors: Factors, begin: Start) -> dict[str, Tensor]:
    """A candidate as the offsets from search-free YaRN that a gradient run would have learned."""
    offsets = torch.log(begin.inv_freq().double() / divided(begin, factors).double())
    return {"offsets.log_factor": offsets.float(), "log_temperature": torch.zeros(1)}
