"""Bases whose config scales RoPE already are continued: their own table is the identity, and YaRN is laid over it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NATIVE, VOCABULARY, recipe_tree, save_tiny, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from yarn_tune.adapter.config import YarnTuneConfig
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.errors import UserError
from yarn_tune.evaluation.comparison import compare
from yarn_tune.evaluation.methods import search_free_methods
from yarn_tune.evaluation.nll_cache import NllCache
from yarn_tune.export.checkpoint import export
from yarn_tune.models.base import BaseModel
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.wrappers import rotary_site
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Rope
from yarn_tune.rope import YarnRamp, default_inv_freq, yarn_inv_freq
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach, detach
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.rotary import at_start

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from longrope_search import initial_factors, offsets_of  # noqa: E402

REACH = 4 * NATIVE
"""What the bases here read."""
IDS = torch.randint(VOCABULARY, (1, REACH), generator=torch.Generator().manual_seed(3))
RISING = [1.0 + 0.5 * i for i in range(8)]

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": NATIVE}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": NATIVE,
            "short_factor": [1.0] * 8, "long_factor": RISING}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
BASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama3": ("llama", LLAMA3),
    "linear": ("llama", LINEAR),
    "yarn": ("qwen2", YARN),
    "yarn, unrounded": ("llama", YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, own multiplier": ("qwen3", YARN | {"attention_factor": 1.05}),
    "longrope": ("llama", LONGROPE),
    "longrope, Phi-3": ("phi3", LONGROPE),
    "linear in gemma3_text": ("gemma3_text", LINEAR),
}


def extras(name: str) -> tuple[str, dict[str, object]]:
    family, section = BASES[name]
    section = section | {"rope_theta": 1e4}
    if section["rope_type"] == "longrope":
        pairs = tiny_config(family).hidden_size // 8
        section |= {"short_factor": [1.0] * pairs, "long_factor": [1.0 + 0.5 * i for i in range(pairs)]}
    if family == "qwen3":
        section["rope_theta"] = 1e6
    rope: dict[str, object] = section
    if family == "gemma3_text":
        rope = {"full_attention": section, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return family, {"rope_parameters": rope, "max_position_embeddings": REACH}


def base_of(name: str):
    family, extra = extras(name)
    return tiny_model(family, **extra)


def start_of(model, window: int, **rope: object) -> Start:
    return Start.of(rope_facts(model.config), Rope(window=window, **rope))


@pytest.mark.parametrize("frequencies", ["scale", "ramp", "per_pair"])
@pytest.mark.parametrize("name", BASES)
def test_with_nothing_to_extend_the_start_is_the_base(name, frequencies):
    """To the bit, at every length beyond the one where longrope changes its table."""
    model = base_of(name)
    begin = start_of(model, REACH)
    with torch.no_grad():
        expected = model(IDS).logits
        rotary = attach(model, begin, frequencies)
        assert begin.stretch == 1
        if name == "yarn, unrounded" or "yarn" not in name or frequencies == "per_pair":
            assert torch.equal(model(IDS).logits, expected)
        else:  # the betas of a rounded ramp are found again by a logarithm
            torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-4)
        detach(model)
        assert torch.equal(model(IDS).logits, expected)
    assert rotary.learned().attention_factor == pytest.approx(rope_facts(model.config).scaling.attention_factor)


@pytest.mark.parametrize("name", BASES)
def test_the_table_is_the_one_transformers_computes(name):
    model = base_of(name)
    facts = rope_facts(model.config)
    parent, attribute = rotary_site(model)
    stock = getattr(parent, attribute)
    prefix = "full_attention_" if facts.layer_kind else ""
    options = (facts.layer_kind,) if facts.layer_kind else ()
    for length in (NATIVE // 2, REACH):
        stock(torch.zeros(1), torch.arange(length)[None], *options)  # longrope chooses its table by the length read
        table, multiplier = facts.table(length)
        assert torch.equal(table, getattr(stock, f"{prefix}inv_freq"))
        assert multiplier == getattr(stock, f"{prefix}attention_scaling")
    assert facts.native == REACH


@pytest.mark.parametrize("name", [name for name in BASES if BASES[name][1]["rope_type"] == "yarn"])
def test_yarn_is_continued_as_yarn_with_a_larger_factor(name):
    family, extra = extras(name)
    section = extra["rope_parameters"]
    larger = tiny_model(
        family, **extra | {"rope_parameters": section | {"factor": 8.0}, "max_position_embeddings": 2 * REACH}
    )
    parent, attribute = rotary_site(larger)
    begin = start_of(base_of(name), 2 * REACH)
    assert begin.factor == 8
    assert begin.stretch == 2
    assert torch.equal(begin.inv_freq(), getattr(parent, attribute).inv_freq)
    stock = rope_facts(larger.config).scaling.attention_factor
    given = section.get("attention_factor")
    own = stock if given is None else given * (0.1 * torch.tensor(8.0).log() + 1) / (0.1 * torch.tensor(4.0).log() + 1)
    assert begin.attention_factor == pytest.approx(float(own), rel=1e-6)


@pytest.mark.rope_warnings
def test_a_shipped_yarn_whose_config_names_the_old_window_reads_what_its_factor_says():
    """The section is the one that Qwen2.5's model card recommends."""
    config = tiny_config("qwen2", rope_parameters=YARN | {"rope_theta": 1e4}, max_position_embeddings=NATIVE)
    assert rope_facts(config).native == REACH


def test_over_linear_scaling_yarn_counts_the_turns_that_pairs_really_make():
    """A model whose positions are divided by 4 is, extended, the unscaled one extended from a quarter of its window."""
    begin = start_of(base_of("linear"), 4 * REACH)
    theta, dim = begin.facts.theta, begin.facts.dim
    found = begin.yarn(4.0, 8.0, 1.5)
    expected = yarn_inv_freq(theta, dim, 4.0, YarnRamp(REACH // 4, 8.0, 1.5, truncate=False)) / 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama3", "longrope", "linear in gemma3_text"])
def test_laid_over_another_scaling_fast_pairs_stay_and_slow_ones_stretch(name):
    begin = start_of(base_of(name), 2 * REACH, beta_fast=8.0)
    own, _ = begin.facts.table(REACH)
    divisors = own / begin.inv_freq()
    turns = REACH * own / (2 * torch.pi)
    assert (divisors[turns > 4 * 8.0] == 1).all()
    torch.testing.assert_close(divisors[turns < 0.25], torch.full_like(divisors[turns < 0.25], 2.0))
    assert (divisors.diff() >= -1e-6).all()
    assert begin.attention_factor == pytest.approx(begin.facts.scaling.attention_factor * 1.0693147, rel=1e-6)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("frequencies", ["scale", "per_pair"])
def test_from_training_to_a_reloaded_checkpoint(tmp_path, name, frequencies):
    """export() compares the reload with the tuned model; the base's own figures are those of stock classes."""
    family, extra = extras(name)
    base = save_tiny(tmp_path / "base", family, **extra)
    settings = ["rope.window=512", f"rope.frequencies={frequencies}", "train.steps=2", "eval.documents=1"]
    recipe = parse_recipe(recipe_tree(base, tmp_path, ids=True), settings)
    run = Run(recipe, tmp_path / "run")
    train(run)
    target = export(run)
    assert max(json.loads((target / "fidelity.json").read_text())["max_abs_logit_difference"].values()) <= 1e-4
    config = AutoConfig.from_pretrained(target)
    assert config.max_position_embeddings >= 512
    section = config.rope_parameters.get("full_attention", config.rope_parameters)
    kept = BASES[name][1]["rope_type"] == "yarn" and frequencies == "scale"
    assert section["rope_type"] == ("yarn" if kept else "longrope")
    comparison = compare(run, {}, only=["none", "yarn"])
    _, document = heldout_excerpts(recipe.data, run.base, 512, 1)[0]
    cache = NllCache(run.base, tmp_path / "nll")
    for length in (REACH, 512):
        stock, _ = cache.stock(document[:length])
        assert comparison.row("none").nll[length] == pytest.approx(stock.double().mean().item(), abs=2e-6)


def test_search_starts_from_the_bases_own_table():
    begin = start_of(base_of("llama3"), 2 * REACH)
    first = initial_factors(begin)
    assert first["linear"] == [2.0] * 8
    assert min(first["yarn"]) == pytest.approx(1)
    assert max(first["yarn"]) == pytest.approx(2)
    model = base_of("llama3")
    rotary = attach(model, begin, "per_pair")
    factors = [1.0 + i / 8 for i in range(8)]
    rotary.load_numbers(offsets_of(factors, begin))
    own, multiplier = begin.facts.table(REACH)
    torch.testing.assert_close(own / rotary.table()[0], torch.tensor(factors))
    assert rotary.learned().attention_factor == pytest.approx(multiplier * 1.0693147, rel=1e-6)


def test_methods_are_laid_over_the_bases_table():
    begin = start_of(base_of("llama3"), 2 * REACH)
    own, _ = begin.facts.table(REACH)
    found = search_free_methods(begin, ["linear", "dynamic"])
    torch.testing.assert_close(found["linear"].table_of(512)[0], own / 2)
    plain = default_inv_freq(begin.facts.theta, begin.facts.dim)
    assert torch.equal(found["dynamic"].table_of(REACH)[0], own * (plain / plain))


def test_betas_of_ones_own_are_not_dropped():
    model = base_of("yarn, unrounded")
    with pytest.raises(
        UserError, match="rope.beta_fast, rope.beta_slow: 20 and 1, but the base ships YaRN with 16 and 2"
    ):
        start_of(model, 2 * REACH, beta_fast=20.0)
    assert start_of(model, 2 * REACH, beta_fast=16.0, beta_slow=2.0).beta_fast == 16
    assert start_of(model, 2 * REACH).beta_slow == 2


@pytest.mark.rope_warnings
def test_dynamic_scaling_is_refused():
    with pytest.raises(UserError, match="rope_type 'dynamic', which depends on the prompt length"):
        rope_facts(tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))


def test_numbers_learned_over_one_scaling_do_not_go_on_another():
    scaled, plain = rope_facts(base_of("llama3").config), rope_facts(tiny_config("llama"))
    adapter = YarnTuneConfig(window=512)
    adapter.start(scaled)
    adapter.start(scaled)
    for other in (plain, replace(scaled, scaling=rope_facts(base_of("linear").config).scaling)):
        with pytest.raises(UserError, match="learned on a base with base_scaling llama3"):
            adapter.start(other)


def test_a_window_inside_the_bases_own_is_refused(tmp_path):
    base = save_tiny(
        tmp_path / "base", "llama", rope_parameters=LLAMA3 | {"rope_theta": 1e4}, max_position_embeddings=REACH
    )
    recipe = parse_recipe(recipe_tree(base, tmp_path), [f"rope.window={REACH // 2}"])
    with pytest.raises(UserError, match=f"smaller than the base model's native window {REACH}"):
        at_start(BaseModel(recipe.base), recipe.rope)


def test_what_a_run_learned_is_settled_over_the_bases_table(tmp_path):
    base = save_tiny(
        tmp_path / "base", "llama", rope_parameters=LLAMA3 | {"rope_theta": 1e4}, max_position_embeddings=REACH
    )
    recipe = parse_recipe(recipe_tree(base, tmp_path), ["rope.window=512", "rope.frequencies=scale", "train.steps=2"])
    run = Run(recipe, tmp_path / "run")
    train(run)
    learned = learned_of(run)
    stock = AutoModelForCausalLM.from_pretrained(export(run))
    parent, attribute = rotary_site(stock)
    torch.testing.assert_close(getattr(parent, attribute).inv_freq, learned.inv_freq(), rtol=1e-6, atol=0)
