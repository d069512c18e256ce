"""`rope.init`: every search-free method as the start of learning, against transformers' own rope functions."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import NATIVE, VOCABULARY, finished_run, recipe_tree, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.models.base import BaseModel
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import METHODS, Rope
from yarn_tune.rope import abf_theta, cope_inv_freq, default_inv_freq
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach, detach
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.rotary import at_start

WINDOW, FACTOR = 4 * NATIVE, 4.0
THETA = 1e4
IDS = torch.randint(VOCABULARY, (1, WINDOW), generator=torch.Generator().manual_seed(1))
ORIGINAL = {"rope_theta": THETA, "factor": FACTOR, "original_max_position_embeddings": NATIVE}
SECTIONS = {
    "yarn": {"rope_type": "yarn", **ORIGINAL},
    "ntk-by-parts": {"rope_type": "yarn", "attention_factor": 1.0, **ORIGINAL},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": FACTOR},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "abf": {"rope_type": "default", "rope_theta": abf_theta(THETA, NATIVE, FACTOR)},
}
"""The rope section with which a stock model computes each method, where there is one."""


def stock(config, section, seq_len=None):
    """The table and multiplier of transformers' own function for a rope section."""
    config = type(config).from_dict(config.to_dict() | {"rope_parameters": section, "max_position_embeddings": WINDOW})
    if section["rope_type"] == "default":
        return default_inv_freq(section["rope_theta"], 16), 1.0
    return ROPE_INIT_FUNCTIONS[section["rope_type"]](config, "cpu", seq_len)


def expected(config, method):
    """The table and multiplier of a method, computed by other means than the package's own start."""
    if method in SECTIONS:
        return stock(config, SECTIONS[method])
    if method == "cope":
        return cope_inv_freq(default_inv_freq(THETA, 16)), 1.0
    # NTK-aware scaling is the dynamic one at a length of factor x native, where transformers' growth is the factor.
    dynamic = type(config).from_dict(
        config.to_dict()
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 1.0},
           "max_position_embeddings": NATIVE}
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS["dynamic"](dynamic, "cpu", round(FACTOR * NATIVE))


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_method(method):
    """Table and logits, against transformers' functions and a stock model with that rope section."""
    model = tiny_model()
    start = Start.of(rope_facts(model.config), Rope(window=WINDOW, init=method))
    table, multiplier = expected(model.config, method)
    torch.testing.assert_close(start.inv_freq(), table, rtol=2e-6, atol=2e-8)
    assert start.attention_factor == pytest.approx(multiplier, rel=1e-7)
    with torch.no_grad():
        attach(model, start, "per_pair")
        begun = model(IDS).logits
        detach(model)
        if method in SECTIONS:
            config = type(model.config).from_dict(
                model.config.to_dict()
                | {"rope_parameters": SECTIONS[method], "max_position_embeddings": WINDOW}
            )  # fmt: skip
            other = AutoModelForCausalLM.from_config(config).eval()
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(begun, other(IDS).logits, rtol=0, atol=2e-5)
        base = model(IDS).logits
    assert (begun - base).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frequencies", ["per_pair", "fixed"])
def test_an_export_without_learned_offsets_serves_the_method(tmp_path, method, frequencies):
    """The stock model that loads the export has the method's table; with fixed frequencies, beside gains."""
    zero = {"log_temperature": 0.0, ("offsets.log_factor" if frequencies == "per_pair" else "offsets.log_scale"): 0.0}
    settings = (f"rope.init={method}", "export.fold=auto")
    if frequencies == "fixed":
        settings += ("rope.query_gains=layer",)
        zero["gains.log_gain"] = 0.0
    run = finished_run(tmp_path, frequencies, window=WINDOW, settings=settings, **zero)
    served = AutoModelForCausalLM.from_pretrained(export(run), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, dtype=torch.float32)
    table, multiplier = expected(model.config, method)
    torch.testing.assert_close(served.model.rotary_emb.inv_freq, table, rtol=2e-6, atol=2e-8)
    # Beside gains, what readers do not compute by themselves is in the queries. Alone, the multiplier may be moved to
    # the nearest one that longrope's formula gives.
    fold = json.loads((run.folder / "export" / "fidelity.json").read_text()).get("fold", {"gain": 1.0})["gain"]
    found = served.model.rotary_emb.attention_scaling * math.sqrt(fold)
    assert found == pytest.approx(multiplier, rel=1e-5)
    config = json.loads((run.folder / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] >= WINDOW


def test_cope_leaves_every_pair_a_frequency_that_a_config_can_hold():
    """The slowest pair, which CoPE stops, turns by less than a float32 angle can show."""
    start = Start.of(rope_facts(tiny_model().config), Rope(window=WINDOW, init="cope"))
    slowest = start.inv_freq()[-1].item()
    assert 0 < slowest * 1e6 < 1e-4
    assert start.table()[0][-1] == 0


def test_a_table_that_is_no_ramp_has_no_scale_to_learn(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    with pytest.raises(UserError, match=r"rope\.init: .*no YaRN ramp.*per_pair or fixed; found 'cope'"):
        parse_recipe(tree, ["rope.init=cope", "rope.frequencies=scale"])
    parse_recipe(tree, ["rope.init=ntk-by-parts", "rope.frequencies=scale"])


def test_training_goes_on_from_another_method(tmp_path):
    """A run from CoPE, its adapter, and a run that begins with its numbers: offsets from YaRN that give its table."""
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    first = Run(parse_recipe(tree, ["rope.init=cope", "train.learning_rate=0.01"]), tmp_path / "first")
    learned = train(first)
    assert all(map(math.isfinite, learned.factors))
    slowest = default_inv_freq(THETA, 16)[-1] / learned.inv_freq()[-1]
    assert slowest > 1e6  # it began stopped, not as YaRN's, which divides it by the factor
    adapter = json.loads((first.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["init"] == "cope"
    for name, init in (("run", first.folder), ("adapter", first.folder / "adapter")):
        next_recipe = parse_recipe(tree, [f"rope.init={init}", "train.learning_rate=1e-9", "train.seed=1"])
        again = train(Run(next_recipe, tmp_path / f"from-{name}"))
        torch.testing.assert_close(again.inv_freq(), learned.inv_freq(), rtol=1e-5, atol=0)
        assert again.attention_factor == pytest.approx(learned.attention_factor, rel=1e-5)
    before = replace(first, recipe=parse_recipe(tree, ["rope.init=abf", "train.learning_rate=0.01"]))
    with pytest.raises(UserError, match="holds a run with other values"):
        train(before)


def test_frequencies_that_were_kept_cannot_be_continued_from_yarn(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    fixed = ["rope.frequencies=fixed", "rope.query_gains=layer"]
    first = Run(parse_recipe(tree, [*fixed, "rope.init=cope"]), tmp_path / "first")
    train(first)
    assert set(load_file(first.numbers_path)) == {"offsets.log_scale", "log_temperature", "gains.log_gain"}
    with pytest.raises(UserError, match=r"rope\.init: .*kept the frequencies of CoPE"):
        train(Run(parse_recipe(tree, [*fixed, f"rope.init={first.folder}"]), tmp_path / "second"))


def test_an_adapter_without_the_key_is_an_offset_from_yarn(tmp_path):
    """Adapters written before `init` existed keep their checksum and their meaning."""
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    first = Run(parse_recipe(tree, []), tmp_path / "first")
    train(first)
    path = first.folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("init") == "yarn"
    path.write_text(json.dumps(config))
    again = parse_recipe(tree, [f"rope.init={first.folder / 'adapter'}", "train.seed=1", "train.learning_rate=1e-9"])
    train(Run(again, tmp_path / "again"))
    base = BaseModel(first.recipe.base)
    assert at_start(base, again.rope).start.method == "yarn"
