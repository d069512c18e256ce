"""The cost of compare and export, and plans of every recipe without its base and without a network."""

import json
import re
from pathlib import Path

import pytest
from published import PUBLISHED, published
from yarn_tune.cli.main import main
from yarn_tune.planning import Shape, estimate_results
from yarn_tune.recipe import Recipe, load_recipe, parse_recipe, published_sizes

ROOT = Path(__file__).parents[2]
SEVEN_B = Shape.of(published("llama-2-7b-32k"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def recipe(*settings: str) -> Recipe:
    """Llama-2-7B to 131072 tokens."""
    rope, data = {"window": 131072, "native": 4096}, {"train": ["a"], "heldout": ["b"]}
    return parse_recipe({"name": "a", "base": {"model": "a"}, "rope": rope, "data": data}, list(settings))


def forward(tokens: int) -> float:
    """A pass of Llama-2-7B, by hand: 2 operations per weight and token, and causal attention of 32 layers."""
    return 2 * (6_738_415_616 - 32000 * 4096) * tokens + 4 * 32 * 4096 * tokens**2 / 2


def test_the_passes_of_a_comparison_by_hand():
    made = recipe("eval.documents=3", "data.heldout_unlike=[c]", "eval.methods=[ntk, dynamic]")
    found = estimate_results(made, SEVEN_B)
    # 4096 tokens doubled up to 131072: 6 lengths. A window of 4096 moves by 1024 over 131072: 1 + 124 windows.
    slid = 1 + (131072 - 4096) // 1024
    assert slid == 125
    # none, ntk, dynamic, yarn and tuned in one pass; dynamic at the 5 shorter lengths; the base and tuned slid.
    assert found.passes == 6 * (5 + 5 + 2 * slid)
    assert (found.excerpts, found.methods, found.prompts) == (6, 7, 0)
    shorter = sum(forward(4096 * 2**n) for n in range(5))
    assert found.compare_flops == pytest.approx(6 * (5 * forward(131072) + shorter + 2 * slid * forward(4096)))
    # Prompts of 2048, 4096, 4097, 8192 and 131072 tokens, by two models.
    assert found.export_flops == pytest.approx(2 * sum(map(forward, (2048, 4096, 4097, 8192, 131072))))
    assert found.export_gib == pytest.approx(6_738_415_616 * 2 / 2**30)


def test_prompts_and_the_control_are_counted():
    plain = estimate_results(recipe("eval.documents=1"), SEVEN_B)
    asked = estimate_results(recipe("eval.documents=1", "eval.retrieval={lengths: [1000, 3000], per_cell: 2}"), SEVEN_B)
    assert asked.prompts == 2 * 5 * 2
    more = 3 * 5 * 2 * (forward(1000) + forward(3000))
    assert asked.compare_flops - plain.compare_flops == pytest.approx(more, rel=1e-6)
    settings = ("eval.native_adapted=true", "rope.query_gains=pair", "train.gradient_checkpointing=false")
    control = estimate_results(recipe("eval.documents=1", *settings), SEVEN_B)
    assert control.passes - plain.passes == 125
    # 100 steps of 4 rows, cut into 32 windows each: forward and backward, 2 in matrices and 3.5 in attention.
    rows = 100 * 4 * 32 * (2 * 2 * (6_738_415_616 - 32000 * 4096) * 4096 + 3.5 * 4 * 32 * 4096 * 4096**2 / 2)
    assert control.compare_flops - plain.compare_flops == pytest.approx(125 * forward(4096) + rows, rel=1e-6)


def test_the_time_of_results_is_in_the_plan(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "recipes/llama-2-7b-32k.yaml"]) == 0
    text = capsys.readouterr().out
    made = load_recipe("recipes/llama-2-7b-32k.yaml")
    found = estimate_results(made, SEVEN_B)
    (compare,) = re.findall(r"  compare   (\d+) excerpts x (\d+) methods \((\d+) passes\)", text)
    assert tuple(map(int, compare)) == (found.excerpts, found.methods, found.passes)
    (minutes,) = re.findall(r"PFLOP: about (\d+) minutes at 100 TFLOP/s", text)
    assert int(minutes) == round(found.compare_flops / 1e14 / 60)
    (gib, seconds) = re.findall(
        r"  export    ([\d.]+) GiB of files; .*: about (\d+) (?:minutes|seconds) at 15 TFLOP", text
    )[0]
    assert float(gib) == 12.55
    assert int(seconds) in (round(found.export_flops / 1.5e13), round(found.export_flops / 1.5e13 / 60))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned_without_its_base(path, capsys, monkeypatch, tmp_path):
    """The numbers are those of the table in recipes/README.md; the shapes those that other tests keep by hand."""
    monkeypatch.chdir(ROOT if path.stem == "tiny-demo" else tmp_path)  # the demo's base is part of the repository
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    made = load_recipe(path)
    tokens = made.train.steps * made.train.batch_size * made.row_tokens()
    assert f"x {made.train.batch_size} rows x {made.row_tokens()} = {tokens:,} tokens" in text
    for wanted in ("GPU-hours", "  memory ", "  fits ", "  compare ", "  export "):
        assert wanted in text
    (line,) = (
        line for line in (ROOT / "recipes/README.md").read_text().splitlines() if line.startswith(f"| `{path.name}` |")
    )
    *_, numbers, hours, _ = (cell.strip() for cell in line.strip("| ").split(" | "))
    assert sum(plan["learned_numbers"].values()) == int(numbers.replace(",", ""))
    assert plan["gpu_hours"] == pytest.approx(float(hours or 0), abs=0.5 if float(hours or 0) >= 10 else 0.051)
    results = plan["results"]
    assert results["excerpts"] == made.eval.documents * (2 if made.data.heldout_unlike else 1)
    assert 0 < results["export_flops"] < results["compare_flops"]
    if path.stem == "tiny-demo":
        assert not any("not on this machine" in note for note in plan["notes"])
        return
    (note,) = (note for note in plan["notes"] if note.startswith("the base is not on this machine"))
    assert re.search(r"https://huggingface.co/[\w.-]+/[\w.-]+/blob/main/config.json", note)
    sizes = published_sizes(made.base.model).config
    family, kept = PUBLISHED[path.stem]
    assert {key: sizes[key] for key in kept} == kept
    assert sizes["model_type"] == family
    assert set(sizes) - set(kept) <= {"model_type", "partial_rotary_factor"}
    parameters = plan["cost"]["parameters"]
    assert results["export_gib"] == pytest.approx(parameters * 2 / 2**30)
    assert published(path.stem).hidden_size == sizes["hidden_size"]


def test_another_base_that_is_not_here_is_not_guessed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / "qwen3-8b-128k.yaml"
    assert main(["plan", str(path), "base.model=someone/Qwen3-8B", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["cost"], plan["results"], plan["learned_numbers"]) == (None, None, None)
    assert "someone/Qwen3-8B is not in the local hub cache" in " ".join(plan["notes"])
