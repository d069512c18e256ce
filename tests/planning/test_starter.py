"""A first recipe: valid, planned, the richest that the family carries, within the memory named."""

from pathlib import Path

import pytest
from published import published
from tiny import FAMILY_SIZES, NATIVE, YARN_ALONE, recipe_tree, save_tiny, tiny_config, words
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.query_layout import query_site
from yarn_tune.planning.starter import Hardware, learning_rate, propose
from yarn_tune.recipe.loading import load_recipe

SITES = {family: query_site(tiny_config(family).to_dict()) for family in FAMILY_SIZES if FAMILIES[family].queries}
NORMED = [family for family, site in SITES.items() if site.normed]
PLAIN = [family for family in FAMILY_SIZES if family not in SITES]
WANTED = dict.fromkeys(YARN_ALONE, ("scale", "pair_phase")) | dict.fromkeys(NORMED, ("per_pair", "pair"))
WANTED |= dict.fromkeys(PLAIN, ("per_pair", "none"))
"""Elsewhere: one factor a pair, with gains and phases."""


BIASED = {
    "arcee", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "granite", "llama", "nemotron", "olmo",
    "olmo2", "olmo3", "persimmon", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
}  # fmt: skip
"""Families whose config can have biases of queries and keys, which vLLM reads."""


WANTED |= dict.fromkeys(("axk1", "bailing_hybrid", "youtu"), ("per_pair", "pair_phase"))  # not served by vLLM


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_the_richest_a_family_carries(tmp_path, family):
    base = save_tiny(tmp_path / "base", family)
    made = propose(str(base), 4 * NATIVE, ["a.txt"], ["b.txt"])
    assert (made.recipe.rope.frequencies, made.recipe.rope.query_gains) == WANTED.get(
        family, ("per_pair", "pair_phase")
    )
    assert made.recipe.rope.qk_bias is (family in BIASED)
    if made.recipe.rope.qk_bias:
        assert "  qk_bias: true " in made.text
        assert made.recipe.train.learning_rate.bias == pytest.approx(0.012, rel=0.05)
    path = tmp_path / "made.yaml"
    path.write_text(made.text)
    assert load_recipe(path) == made.recipe


def test_plan_and_train_accept_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    files = recipe_tree(tmp_path / "base", tmp_path)["data"]
    words = ["init", "base", "--window", "256", "--train", *files["train"], "--heldout", *files["heldout"]]
    assert main(words) == 0
    assert "next: yarn-tune plan base-256.yaml" in capsys.readouterr().out
    assert main(["plan", "base-256.yaml"]) == 0
    assert main(["train", "base-256.yaml", "train.steps=1", "base.dtype=float32"]) == 0
    assert Path("runs/base-256/learned.safetensors").is_file()
    assert main(words) == 2
    assert "base-256.yaml exists" in capsys.readouterr().err


def test_it_names_its_own_file_and_measures_needles(tmp_path):
    base = str(save_tiny(tmp_path / "base"))
    made = propose(base, 256, ["a"], ["b"])
    assert "#   ./launch.sh base-256.yaml\n" in made.text
    assert "#   ./launch.sh mine/first.yaml\n" in propose(base, 256, ["a"], ["b"], out="mine/first.yaml").text
    assert made.recipe.eval.retrieval is not None


def test_rows_follow_the_memory(tmp_path):
    base = save_tiny(tmp_path / "base", hidden_size=512, num_hidden_layers=8, intermediate_size=8192)
    found = []
    for gib in (80, 2.8, 2.4, 2.2):
        made = propose(str(base), 256 * NATIVE, ["a"], ["b"], Hardware(gib))
        (tmp_path / "made.yaml").write_text(made.text)
        assert load_recipe(tmp_path / "made.yaml") == made.recipe
        train = made.recipe.train
        found.append((train.gradient_checkpointing, train.keep_attention, train.offload_activations))
    assert found == [(False, False, False), (True, True, False), (True, False, False), (True, False, True)]
    with pytest.raises(UserError, match="--gpu-memory: 1.5 GiB do not hold this model"):
        propose(str(base), 256 * NATIVE, ["a"], ["b"], Hardware(1.5))


def test_what_cannot_be_tuned(tmp_path):
    base = save_tiny(tmp_path / "base", "mistral", sliding_window=16)
    with pytest.raises(UserError, match="sliding window"):
        propose(str(base), 256, ["a"], ["b"])


def seven_billion(folder: Path) -> Path:
    """The config of a Llama of 7B parameters, which is all that is read."""
    published("llama-2-7b-32k").save_pretrained(folder)
    return folder


def test_weights_that_do_not_fit_one_gpu_are_split(tmp_path):
    base = str(seven_billion(tmp_path / "base"))
    with pytest.raises(UserError, match="do not hold this model .* more of them"):
        propose(base, 32768, ["a"], ["b"], Hardware(12))
    made = propose(base, 32768, ["a"], ["b"], Hardware(18, gpus=3))
    assert (made.recipe.runtime.zero, made.recipe.runtime.processes, made.recipe.train.batch_size) == (3, 3, 9)
    assert made.cost.weights_gib + made.cost.activations_gib <= 0.9 * 18
    (tmp_path / "made.yaml").write_text(made.text)
    assert load_recipe(tmp_path / "made.yaml") == made.recipe
    assert propose(base, 32768, ["a"], ["b"], Hardware(gpus=8)).recipe.runtime.zero == 0


@pytest.mark.parametrize(("window", "row_tokens"), [(8192, 4096), (12288, 6144), (32768, 16384)])
def test_up_to_factor_eight_rows_of_half_the_window_follow_whole_ones(tmp_path, window, row_tokens):
    base = str(seven_billion(tmp_path / "base"))
    wide = propose(base, window, ["a"], ["b"]).recipe
    assert (wide.rope.frequencies, wide.data.row_tokens) == ("per_pair", None)
    weights = propose(base, window, ["a"], ["b"]).cost.weights_gib
    made = propose(base, window, ["a"], ["b"], Hardware((weights + 1.6 * window / 8192) / 0.9))
    assert (made.recipe.rope.frequencies, made.recipe.data.row_tokens) == ("fixed", row_tokens)
    (tmp_path / "made.yaml").write_text(made.text)
    assert load_recipe(tmp_path / "made.yaml") == made.recipe


def test_where_there_is_no_gain_to_learn_short_rows_are_not_proposed(tmp_path):
    """OLMo that clamps its queries carries one temperature alone: rows of the native window would teach nothing."""
    base = str(save_tiny(tmp_path / "base", "olmo", clip_qkv=8.0))
    made = propose(base, 2 * NATIVE, ["a"], ["b"])
    assert (made.recipe.rope.frequencies, made.recipe.rope.query_gains) == ("per_pair", "none")
    with pytest.raises(UserError, match="--gpu-memory: 0.0001 GiB do not hold this model"):
        propose(base, 2 * NATIVE, ["a"], ["b"], Hardware(0.0001))


@pytest.mark.parametrize(
    ("kind", "numbers", "batch_size", "rate"),
    [
        ("gain", 17_280, 1, 0.01),
        ("phase", 17_280, 4, 0.02),
        ("gain", 4 * 17_280, 4, 0.01),
        ("gain", 1_024, 4, 0.03),
        ("gain", 10**7, 1, 0.003),
        ("gain", 131_072, 8, 0.01),
        ("bias", 23_040, 1, 0.004),
        ("bias", 184_320, 8, 0.004),
        ("bias", 1_536, 4, 0.012),
        ("bias", 10**7, 1, 0.0012),
    ],
)
def test_rates_follow_the_batch_and_how_many_numbers_are_learned(kind, numbers, batch_size, rate):
    assert learning_rate(kind, numbers, batch_size) == rate


def test_a_big_model_gets_lower_rates_than_the_default(tmp_path):
    made = propose(str(seven_billion(tmp_path / "base")), 8192, ["a"], ["b"])
    rates = made.recipe.train.learning_rate
    assert (rates.gain, rates.phase) == (0.01, 0.01)  # 131,072 gains and phases, eight rows per step
    assert (rates.frequency, rates.temperature, rates.bias) == (0.02, 0.01, 0.0034)
    assert "  learning_rate: {gain: 0.01, phase: 0.01, bias: 0.0034}" in made.text


def test_a_native_window_that_the_config_overstates(tmp_path, monkeypatch, capsys):
    """`--native` is in the recipe and gives the factor; quoted globs stay globs; wrong numbers are refused."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    for name in ("a-1.txt", "a-2.txt", "b.txt"):
        (tmp_path / name).write_text("some words")
    command = ["init", "base", "--window", "256", "--train", "a-*.txt", "--heldout", "b.txt", "--out", "first.yaml"]
    assert main([*command, "--native", "32"]) == 0
    recipe = load_recipe("first.yaml")
    assert recipe.rope.native == 32
    assert recipe.data.train == ["a-*.txt"]
    assert "(factor 8)" in (tmp_path / "first.yaml").read_text()
    capsys.readouterr()
    assert main([*command[:-1], "second.yaml", "--native", "512"]) == 2
    assert "--native: between 2 and --window (256); found 512" in capsys.readouterr().err


def test_a_single_document_leaves_none_to_decide_on(tmp_path, monkeypatch):
    """plan and train accept the recipe that init writes for one long text."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    recipe_tree(tmp_path / "base", tmp_path)
    (tmp_path / "book.txt").write_text(words(3000, seed=1))
    (tmp_path / "two.jsonl").write_text('{"text": "w1"}\n\n{"text": "w2"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n{"text": ""}\n')
    for train, decide in (
        (["book.txt"], False), (["./book.txt", "book.txt"], False), (["one.jsonl"], False), (["two.jsonl"], True),
        (["book.txt", "one.jsonl"], True), (["hub:org/name"], True),
    ):  # fmt: skip
        assert propose("base", 256, train, ["heldout.jsonl"]).recipe.train.decide is decide, train
    assert main(["init", "base", "--window", "256", "--train", "book.txt", "--heldout", "heldout.jsonl"]) == 0
    assert "  decide: false " in Path("base-256.yaml").read_text()
    assert main(["plan", "base-256.yaml"]) == 0
