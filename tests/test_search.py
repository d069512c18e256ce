"""LongRoPE's search: its arithmetic, its constraints, and that a resumed one ends as an uninterrupted one."""

import importlib.util
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import recipe_tree, save_tiny
from filelock import FileLock
from yarn_tune.card import write_card
from yarn_tune.compare import compare, named_rows
from yarn_tune.errors import UserError
from yarn_tune.evolve import evolve
from yarn_tune.export import export
from yarn_tune.families import RopeFacts
from yarn_tune.learned import Start
from yarn_tune.recipe import parse_recipe
from yarn_tune.rope import default_inv_freq, longrope_inv_freq, ntk_inv_freq
from yarn_tune.search import SearchState, Settings, initial_factors, search
from yarn_tune.train import Run

ROOT = Path(__file__).parents[1]
DIM, FACTOR = 32, 8.0
FACTS = RopeFacts(model_type="llama", theta=1e4, dim=DIM, head_dim=DIM, native=128, partial_rotary_factor=1.0)
START = Start(facts=FACTS, native=128, original=128, window=1024, factor=FACTOR, beta_fast=32.0, beta_slow=1.0)
SEEDS = initial_factors(START)
WANTED = [1 + 7 * (i / 15) ** 2 for i in range(16)]
QUICK = Settings(generations=6, seed=3)


class Bowl:
    """Distance to WANTED; remembers what it was asked."""

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


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    tree = recipe_tree(save_tiny(folder / "base"), folder)
    small = ["rope.learn=search", "train.search.population=8", "train.search.parents=4", "train.search.generations=3",
             "train.search.mutations=2", "train.search.crossovers=2", "train.search.rows=2"]  # fmt: skip
    run = Run(parse_recipe(tree, small), folder / "run")
    return run, evolve(run)


def test_a_search_run_is_a_run_like_any_other(searched):
    run, learned = searched
    state = SearchState.from_json((run.folder / "checkpoints" / "search.json").read_text())
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert sum(line["tokens"] for line in lines) == state.evaluations * 2 * 256
    assert lines[-1]["loss"] == state.best_fitness <= lines[0]["loss"]
    torch.testing.assert_close(torch.tensor(learned.factors), torch.tensor(state.best), rtol=1e-6, atol=0)
    rows, _ = named_rows(run, [])
    assert list(rows) == ["search"]
    found = compare(run, rows, only=["yarn", "search"])
    assert found.row("search").tokens_spent == state.evaluations * 2 * 256
    target = export(run)
    assert f", in 4 generations on {state.evaluations * 2 * 256:,} tokens" in write_card(run, target).read_text()


def test_a_killed_search_goes_on(searched, monkeypatch):
    run, learned = searched
    before = run.numbers_path.read_bytes()
    saved = run.folder / "checkpoints" / "search.json"
    after = saved.read_text()
    again = Run(run.recipe, run.folder.with_name("again"))

    class Killed(Exception):
        pass

    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > 10:
            raise Killed
        return 0.0 + run_judge(*arguments)

    from yarn_tune.evolve import Judge

    run_judge = Judge.__call__
    monkeypatch.setattr(Judge, "__call__", stop)
    with pytest.raises(Killed):
        evolve(again)
    monkeypatch.undo()
    evolve(again)
    assert again.numbers_path.read_bytes() == before
    assert (again.folder / "checkpoints" / "search.json").read_text() == after


def test_a_search_is_alone_in_its_folder(searched):
    run, _ = searched
    with FileLock(run.folder / ".lock"), pytest.raises(UserError, match="another process is learning there"):
        evolve(run)


@pytest.mark.parametrize(
    "setting",
    ["lora.rank=2", "data.needles=0.5", "data.lengths=[64,256]", "train.objective=distill", "train.guard=1.0",
     "runtime.zero=3", "runtime.fsdp=true", "runtime.sequence=2"],
)  # fmt: skip
def test_search_refuses_what_it_would_pass_over(tmp_path, setting):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    key = setting.split("=")[0].removesuffix(".rank")
    with pytest.raises(UserError, match=rf"{re.escape(key)}: the search \(rope.learn\) judges factors by plain nats"):
        parse_recipe(tree, ["rope.learn=search", setting])


def test_the_benchmark_searches_what_the_demos_recipe_allows(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "search_vs_gradient.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.chdir(ROOT)
    ran = []

    def evolve_none(run):
        ran.append(run.recipe)
        run.folder.mkdir()
        (run.folder / "metrics.jsonl").write_text("")

    monkeypatch.setattr(bench, "evolve", evolve_none)
    monkeypatch.setattr(bench, "measured", lambda run, begin, points: points)
    assert bench.by_search(tmp_path / "run", 2) == {}
    (recipe,) = ran
    assert (recipe.rope.learn, recipe.rope.temperature, recipe.train.search.rows) == ("search", "global", 2)


def test_search_wants_possible_settings(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    with pytest.raises(UserError, match=r"train.search.population: at least train.search.parents \(32\); found 8"):
        parse_recipe(tree, ["train.search.population=8"])
