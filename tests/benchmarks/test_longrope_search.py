"""The benchmark's search (LongRoPE's): its arithmetic, its constraints, and that a resumed one ends the same."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import recipe_tree, rows_of, save_tiny
from torch.nn.functional import cross_entropy
from yarn_tune.models.base import BaseModel
from yarn_tune.models.loading import load_model
from yarn_tune.models.rope_config import RopeFacts
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.rope import default_inv_freq, longrope_inv_freq, ntk_inv_freq
from yarn_tune.training.batches import collate
from yarn_tune.tunable.attachment import attach
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.rotary import TunableRotary

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import longrope_search  # noqa: E402
import search_vs_gradient  # noqa: E402
from longrope_search import (  # noqa: E402
    SearchState,
    Settings,
    improvements,
    initial_factors,
    offsets_of,
    search,
    searched,
)

DIM, FACTOR = 32, 8.0
FACTS = RopeFacts(model_type="llama", theta=1e4, dim=DIM, head_dim=DIM, native=128, partial_rotary_factor=1.0)
START = Start(facts=FACTS, native=128, original=128, window=1024, factor=FACTOR, beta_fast=32.0, beta_slow=1.0)
SEEDS = initial_factors(START)
WANTED = [1 + 7 * (i / 15) ** 2 for i in range(16)]
QUICK = Settings(generations=6, seed=3)


class Bowl:
    """The distance to WANTED; keeps its arguments."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, factors: list[float]) -> float:
        self.asked.append(factors)
        return math.dist(factors, WANTED)


def test_the_first_candidates_are_the_published_methods():
    assert SEEDS["linear"] == [FACTOR] * 16
    for name, table in (("ntk", ntk_inv_freq(1e4, DIM, FACTOR)), ("yarn", START.inv_freq())):
        torch.testing.assert_close(longrope_inv_freq(1e4, DIM, SEEDS[name]), table, rtol=1e-6, atol=0)
    assert SEEDS["ntk"][0] == pytest.approx(default_inv_freq(1e4, DIM)[0].item())


def test_every_candidate_rises_within_the_space_and_is_judged_once():
    bowl = Bowl()
    search(bowl, SEEDS, 1.25 * FACTOR, QUICK)
    assert bowl.asked[:3] == list(SEEDS.values())
    for factors in bowl.asked:
        assert all(a <= b for a, b in zip(factors, factors[1:], strict=False))
        assert factors[0] >= 1.0
        assert factors[-1] <= 1.25 * FACTOR + 1e-9
    assert len({tuple(factors) for factors in bowl.asked}) == len(bowl.asked)


def test_the_published_counts():
    state = search(Bowl(), SEEDS, 10.0, QUICK)
    counts = [count for count, _ in state.history]
    assert counts == [64 + 32 * generation for generation in range(7)]
    assert len(state.population) == 32
    assert Settings() == Settings(64, 40, 16, 16, 32, 0.3, 0.01, 0)


def test_it_beats_its_seeds_and_chance():
    bowl = Bowl()
    state = search(bowl, SEEDS, 10.0, Settings(seed=1))
    fitness = [value for _, value in state.history]
    assert fitness == sorted(fitness, reverse=True)
    assert state.best_fitness == min(math.dist(f, WANTED) for f in bowl.asked) == math.dist(state.best, WANTED)
    seeds = min(math.dist(factors, WANTED) for factors in SEEDS.values())
    rng = random.Random(0)
    chance = min(math.dist(sorted(rng.uniform(1, 10) for _ in WANTED), WANTED) for _ in bowl.asked)
    assert state.best_fitness < 0.5 * min(seeds, chance)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_search_ends_the_same(stop):
    saved: list[str] = []
    whole = search(Bowl(), SEEDS, 10.0, QUICK, on_generation=lambda state: saved.append(state.to_json()))
    assert len(saved) == 7
    state = SearchState.from_json(saved[stop])
    assert (state.generation, state.evaluations) == (stop, 64 + 32 * stop)
    assert search(Bowl(), SEEDS, 10.0, QUICK, state) == whole


def test_nan_is_never_chosen_and_seeds_stay_if_nothing_is_better():
    state = search(lambda f: 1.0 if f in SEEDS.values() else math.nan, SEEDS, 10.0, QUICK)
    assert state.best in SEEDS.values()
    assert [fitness for _, fitness in state.population[:4]] == [1.0, 1.0, 1.0, math.inf]


def test_no_room_for_more_candidates_is_no_endless_loop():
    """One pair, three values: the space is used up and generations go on with what there is."""
    state = search(lambda f: f[0], {"linear": [1.02]}, 1.02, Settings(generations=3, population=64))
    assert state.best == [1.0]
    assert state.evaluations <= 3


def test_improvements_are_the_best_after_each_generation():
    """The state also after a generation is the proof; only those that found something better count, and the last."""
    states: list[SearchState] = []
    whole = search(Bowl(), SEEDS, 10.0, QUICK, on_generation=states.append)
    found = improvements(SearchState.from_json(whole.to_json()))
    better = [now for before, now in zip([None, *states], states, strict=False)
              if before is None or now.best_fitness < before.best_fitness or now is states[-1]]  # fmt: skip
    assert found == {state.evaluations: state.best for state in better}


SMALL = Settings(population=8, generations=3, mutations=2, crossovers=2, parents=4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return parse_recipe(recipe_tree(save_tiny(folder / "base"), folder), [])


def test_candidates_are_judged_by_their_nats_on_the_first_rows(recipe, tmp_path):
    """The best's fitness is that of the tunable model with its factors; those are what is compared on."""
    state = searched(recipe, tmp_path, 2, SMALL)
    assert SearchState.from_json((tmp_path / "search.json").read_text()) == state
    assert state.evaluations == 8 + 3 * 4
    begin = Start.of(BaseModel(recipe.base).facts, recipe.rope)
    numbers = offsets_of(state.best, begin)
    rotary = TunableRotary(torch.nn.Identity(), begin, "per_pair")
    rotary.load_numbers(numbers)
    torch.testing.assert_close(torch.tensor(rotary.learned().factors), torch.tensor(state.best), rtol=1e-6, atol=0)
    assert rotary.learned().attention_factor == pytest.approx(begin.attention_factor)
    model = load_model(recipe.base.model, dtype="float32")
    attach(model, begin, "per_pair").load_numbers(numbers)
    rows = rows_of(recipe, BaseModel(recipe.base)).rows[:2]
    batch = collate(rows, torch.device("cpu"))
    labels = batch.pop("labels")
    with torch.no_grad():
        mean = cross_entropy(model(**batch).logits.flatten(0, 1).double(), labels.flatten())
    assert state.best_fitness == pytest.approx(mean.item(), rel=1e-5)


def test_a_killed_search_goes_on(recipe, tmp_path, monkeypatch):
    whole = searched(recipe, tmp_path / "whole", 2, SMALL)

    class Killed(Exception):
        pass

    calls = []
    judge = longrope_search.Judge.__call__

    def stop(*arguments):
        calls.append(1)
        if len(calls) > 10:
            raise Killed
        return judge(*arguments)

    monkeypatch.setattr(longrope_search.Judge, "__call__", stop)
    with pytest.raises(Killed):
        searched(recipe, tmp_path / "again", 2, SMALL)
    monkeypatch.undo()
    assert searched(recipe, tmp_path / "again", 2, SMALL) == whole


def test_the_benchmark_searches_what_the_demos_recipe_allows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ran = []

    def none(recipe, folder, rows):
        ran.append((recipe.rope.frequencies, recipe.rope.query_gains, rows))
        start = Start.of(BaseModel(recipe.base).facts, recipe.rope)
        return search(lambda factors: factors[0], initial_factors(start), 8.0, Settings(population=3, generations=0))

    monkeypatch.setattr(search_vs_gradient, "searched", none)
    monkeypatch.setattr(search_vs_gradient, "measured", lambda run, begin, points: points)
    assert list(search_vs_gradient.by_search(tmp_path / "run", 2)) == [3 * 2 * 2048]
    assert ran == [("per_pair", "none", 2)]
