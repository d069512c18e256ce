"""Every recipe: valid, planned in seconds, and run for two steps on a shrunken model of its family."""

import json
import re
from pathlib import Path

import pytest
import yaml
from published import PUBLISHED, published
from tiny import NATIVE, save_tiny, write_documents
from yarn_tune.cli.main import main
from yarn_tune.models.base import BaseModel
from yarn_tune.planning.cost import estimate_cost
from yarn_tune.planning.memory import RESERVE
from yarn_tune.planning.shape import Shape
from yarn_tune.planning.starter import bias_is_served, with_rates
from yarn_tune.recipe.loading import load_recipe
from yarn_tune.recipe.schema import Base

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FAMILY = {
    "tiny": "llama", "smollm2": "llama", "llama": "llama", "mistral": "mistral", "qwen2.5": "qwen2", "qwen3": "qwen3",
    "gpt": "gpt_neox", "pythia": "gpt_neox", "phi": "phi3", "gemma": "gemma3_text", "command": "cohere",
    "smollm3": "smollm3", "deepseek": "deepseek_v2", "qwen3.5": "qwen3_5_text", "glm": "glm4_moe",
    "minimax": "minimax_m2", "kimi": "deepseek_v3", "ministral": "ministral3",
}  # fmt: skip
OLD = NATIVE // 8
"""Window before the base's own extension."""
RISING = [1.0 + 0.25 * pair for pair in range(8)]
SHIPPED: dict[str, dict[str, object]] = {
    "llama-3.1-8b-256k": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "phi-4-mini-256k": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": RISING},
    "olmo-3-7b-128k": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836},
    "gemma-3-12b-256k": {"rope_type": "linear", "factor": 8.0},
    "kimi-k2-256k": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "deepseek-v2-lite-160k": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}
"""What the real base's config does to RoPE already, over a shrunken window."""


def shrunken(stem: str, folder: Path) -> Path:
    """A small random model like the recipe's base."""
    family = (
        "gemma4_text" if stem.startswith("gemma-4") else FAMILY.get(stem.split("-")[0]) or stem.replace("-", "")[:5]
    )
    extra: dict[str, object] = {}
    if family == "glm4_moe":
        extra["use_qk_norm"] = False  # GLM-4.5 has it, Air has not
    if stem in SHIPPED:
        section = {"rope_theta": 1e4, "original_max_position_embeddings": OLD, **SHIPPED[stem]}
        if section["rope_type"] == "linear":
            del section["original_max_position_embeddings"]  # it has none
        nested = {"full_attention": section, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        extra["rope_parameters"] = nested if family in ("olmo3", "gemma3_text") else section
        if family == "phi3":
            extra["original_max_position_embeddings"] = OLD
        if family == "deepseek_v2":
            extra["max_position_embeddings"] = 40 * OLD
    return save_tiny(folder, family, **extra)


def test_all_recipes_are_found_and_listed():
    assert len(RECIPES) == 29
    listed = (ROOT / "recipes" / "README.md").read_text()
    for path in RECIPES:
        assert f"`{path.name}`" in listed


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_page_one_can_run(path):
    load_recipe(path)
    header = path.read_text().split("base:")[0]
    assert f"recipes/{path.name}" in header or path.stem == "tiny-demo"
    assert "Needs:" in header
    assert "million tokens" in header


@pytest.mark.parametrize("stem", PUBLISHED)
def test_what_it_needs_is_what_plan_counts(stem):
    """The header's memory, on the real base's shape, which fits; and the table's GPU-hours."""
    text, page = (ROOT / "recipes" / f"{stem}.yaml").read_text(), (ROOT / "recipes" / "README.md").read_text()
    recipe = load_recipe(ROOT / "recipes" / f"{stem}.yaml")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{stem}.yaml` |"))
    *_, numbers, hours, _ = (cell.strip() for cell in line.strip("| ").split(" | "))
    cost = estimate_cost(recipe, Shape.of(published(stem)), int(numbers.replace(",", "")))
    spent = cost.step_flops * recipe.train.steps / 1e14 / 3600
    assert float(hours or 0) == pytest.approx(spent, abs=0.5 if spent >= 10 else 0.051)
    if stem.startswith("smollm2"):
        return  # measured, or small
    said = re.search(r"GPUs? with (\d+) GB \((\d+) GiB of weights, (\d+) of\s+(?:# )?activations", text)
    gpu, weights, activations = map(int, said.groups())
    assert weights == pytest.approx(cost.weights_gib, abs=0.51)
    assert activations == pytest.approx(cost.activations_gib, abs=0.51)
    assert cost.weights_gib + cost.activations_gib <= (1 - RESERVE) * gpu


@pytest.mark.parametrize("stem", [stem for stem in PUBLISHED if not stem.startswith(("tiny", "smollm2"))])
def test_recipes_that_were_not_measured_learn_what_init_proposes(stem, tmp_path):
    """Biases wherever they can be served, and the rates that were measured on SmolLM2, scaled to this model."""
    recipe = load_recipe(ROOT / f"recipes/{stem}.yaml")
    published(stem).save_pretrained(tmp_path)
    base = BaseModel(Base(model=str(tmp_path)))
    tree = recipe.to_dict() | {"base": {"model": str(tmp_path)}}
    found, expected = recipe.train.learning_rate, with_rates(base, tree).train.learning_rate
    assert (found.gain, found.phase) == (expected.gain, expected.phase)
    assert recipe.rope.qk_bias is bias_is_served(base, tree)
    if recipe.rope.qk_bias:
        assert found.bias == expected.bias


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_plan_answers(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    recipe = load_recipe(path)
    short = recipe.rope.frequencies == "fixed" and recipe.row_tokens() * 2 == recipe.rope.window
    assert plan["coverage"]["untrained"] == (0.5 if short else 0)
    reads = recipe.train.steps * recipe.train.batch_size * recipe.row_tokens()
    assert (
        f"Reads {reads / 1e6:.1f} million tokens" in path.read_text() or f"Reads {reads / 1e6:.2f}" in path.read_text()
    )


@pytest.mark.parametrize(
    "path",
    # transformers warns about the config that Phi-4 ships: no factor in it
    [pytest.param(p, marks=pytest.mark.rope_warnings if p.stem.startswith("phi") else ()) for p in RECIPES],
    ids=[p.stem for p in RECIPES],
)
def test_two_steps_on_a_shrunken_model(path, tmp_path, monkeypatch, capsys):
    """The recipe as it is, but for a small random model of the family, small windows and local documents."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    base = shrunken(path.stem, tmp_path / "base")
    native = recipe.rope.native or 8192
    window = NATIVE * recipe.rope.window // native if path.stem != "tiny-demo" else 512
    tree = yaml.safe_load(path.read_text())
    tree["base"]["model"] = str(base)
    tree["rope"] |= {"window": window, "native": NATIVE}
    tree["data"] |= {
        "train": [str(write_documents(tmp_path / "train.jsonl", [window * 9], ids=True))],
        "heldout": [str(write_documents(tmp_path / "heldout.jsonl", [window * 2], seed=5, ids=True))],
        "heldout_unlike": [
            str(write_documents(tmp_path / "unlike.jsonl", [window * 2], seed=9, ids=True))
            for _ in recipe.data.heldout_unlike
        ],
    }
    tree["data"].pop("heldout_unlike", None)  # documents of the real base's length
    tree["train"] |= {"steps": 2, "batch_size": 2}
    if recipe.data.row_tokens is not None:
        tree["data"]["row_tokens"] = recipe.data.row_tokens * NATIVE // native
    if recipe.data.lengths is not None:
        tree["data"]["lengths"] = [length * NATIVE // native for length in recipe.data.lengths]
    tree["runtime"] = {}
    tree["eval"] = {"documents": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", "small.yaml", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["comparison"]["like"]["rows"]][-2:] == ["tuned", "tuned-slid"]
    run = tmp_path / "runs" / "small"
    for name in (
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "compare.json",
        "report.md",
        "nll_by_position.png",
    ):
        assert (run / name).is_file()
    assert (run / "export" / "config.json").is_file()
    assert result["serve"] == f"vllm serve runs/small/export --max-model-len {window}"
