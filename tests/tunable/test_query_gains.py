"""Gains and phases on the queries: identity at the start, right gradients, exact in the exported weights."""

import json

import pytest
import torch
from finite_differences import slope_errors
from safetensors.torch import load_file
from tiny import (
    FAMILY_SIZES,
    NATIVE,
    VOCABULARY,
    YARN_ALONE,
    finished_run,
    recipe_tree,
    save_tiny,
    tiny_config,
    tiny_model,
    write_documents,
)
from transformers import AutoModelForCausalLM
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export, export_overrides
from yarn_tune.models.base import BaseModel
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.query_layout import QuerySite, query_site, scaled
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.planning.run_plan import plan
from yarn_tune.recipe.loading import RecipeError, parse_recipe
from yarn_tune.recipe.schema import Rope
from yarn_tune.rope import YarnRamp, yarn_attention_factor, yarn_inv_freq
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach, attach_fixed, base_model_active, detach
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.query_gains import gains_for

SITES = {family: query_site(tiny_config(family).to_dict()) for family in FAMILY_SIZES if FAMILIES[family].queries}
RUNGS = ("layer", "head", "pair", "pair_phase")
IDS = torch.randint(1, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))


def carries(family: str, rung: str) -> bool:
    site = SITES.get(family)
    return site is not None and not (rung == "head" and site.groups == 1) and not (rung == "pair_phase" and site.normed)


CARRIED = [(family, rung) for family in sorted(FAMILY_SIZES) for rung in RUNGS if carries(family, rung)]


def tuned_model(family: str, rung: str):
    model = tiny_model(family)
    start = Start.of(rope_facts(model.config), Rope(window=4 * NATIVE))
    return model, attach(model, start, "per_pair", [gains_for(model.config.to_dict(), rung)])


def loss_of(model):
    logits = model(IDS, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize(("family", "rung"), CARRIED)
def test_the_start_is_yarn_and_gradients_match_finite_differences(family, rung):
    """Along the gradient of the gains alone, where the signal is largest."""
    torch.manual_seed(0)
    model = tiny_model(family)
    start = Start.of(rope_facts(model.config), Rope(window=4 * NATIVE))
    attach(model, start, "per_pair")
    with torch.no_grad():
        yarn = model(IDS, use_cache=False).logits
    detach(model)
    rotary = attach(model, start, "per_pair", [gains_for(model.config.to_dict(), rung)])
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, yarn, rtol=0, atol=1e-6)
    parameters = list(rotary.gains.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.2)
    loss_of(model).backward()
    gradients = [p.grad.clone() for p in parameters]
    assert all(bool((g != 0).all()) for g in gradients), "every number learned must do something"
    assert min(slope_errors(lambda: loss_of(model), parameters, gradients, (1e-1, 3e-2, 1e-2, 2e-3, 5e-4))) < 0.02


@pytest.mark.parametrize(("family", "rung"), CARRIED)
def test_the_export_computes_what_was_learned(tmp_path, family, rung):
    """Stock transformers on folded weights against hooks in memory, up to the last position of the window."""
    frequencies = "scale" if family in YARN_ALONE else "per_pair"
    target = export(finished_run(tmp_path, frequencies, family, settings=(f"rope.query_gains={rung}",)))
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
    assert max(map(int, fidelity["max_abs_logit_difference"])) == 256
    assert fidelity["learned"]["folds"]["gain"]["gains"]["complex"] == (rung == "pair_phase")
    assert not (target / "overrides.json").exists()
    config = json.loads((target / "config.json").read_text())
    assert "auto_map" not in config


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_complex_gain_commutes_with_the_rotation(interleaved):
    """Scaling before RoPE is scaling after it, and the logit gets |c| and a shift of its angle; in float64."""
    config = tiny_config("cohere" if interleaved else "llama")
    site = query_site(config.to_dict())
    generator = torch.Generator().manual_seed(0)
    heads, dim = site.rows.shape
    gains = torch.polar(
        0.5 + torch.rand(heads, dim // 2, generator=generator, dtype=torch.float64),
        torch.randn(heads, dim // 2, generator=generator, dtype=torch.float64),
    )
    q = torch.randn(heads * dim, generator=generator, dtype=torch.float64)

    def pairs(x):
        """`[heads, d/2]` complex."""
        x = x.reshape(heads, dim)
        return torch.complex(x[:, 0::2], x[:, 1::2]) if interleaved else torch.complex(*x.split(dim // 2, 1))

    torch.testing.assert_close(pairs(scaled(q, site, gains)), pairs(q) * gains)
    torch.testing.assert_close(pairs(scaled(q, site, gains.abs())), pairs(q) * gains.abs())


def test_a_pass_through_dimension_keeps_its_gain():
    site = query_site(tiny_config("gpt_neox", rotary_pct=0.25, hidden_size=128).to_dict())
    x = torch.ones(3 * 128)
    factor = scaled(x, site, torch.full((4, 4), 2.0))
    assert factor.reshape(4, 3, 32)[:, 0, :8].eq(2).all()
    assert factor.sum() == 3 * 128 + 4 * 8


def test_where_the_rows_are_is_found_once(monkeypatch):
    """Gains are not computed in every layer; a gradient is possible after a first pass without gradients."""
    found, find = [], QuerySite._find
    monkeypatch.setattr(QuerySite, "_find", lambda self, *where: found.append(where) or find(self, *where))
    model, _ = tuned_model("llama", "pair_phase")
    with torch.inference_mode():
        loss_of(model)
    loss_of(model).backward()
    assert found == [(64, torch.device("cpu"))]


@pytest.mark.parametrize(
    ("rung", "count"),
    [("layer", 3), ("head", 12), ("pair", 3 * 4 * 8), ("pair_phase", 2 * 3 * 4 * 8)],
)
def test_plan_says_how_many_numbers(tmp_path, rung, count):
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path), [f"rope.query_gains={rung}"])
    made = plan(recipe, BaseModel(recipe.base))
    assert sum(made.learned_numbers.values()) == 8 + 1 + count
    assert f"{9 + count} numbers (per_pair, query gains {rung}: 8 frequency, 1 temperature, " in made.text()


@pytest.mark.parametrize(
    ("family", "rung", "extra", "message"),
    [
        ("qwen3", "head", {}, "heads of qwen3 share one norm of the queries; use layer or pair"),
        ("qwen3", "pair_phase", {}, "pair_phase cannot be folded here: qwen3 normalises queries; use pair"),
        ("olmo2", "pair_phase", {}, "olmo2 normalises queries"),
        ("olmo", "layer", {"clip_qkv": 8.0}, "this olmo clamps its queries"),
        ("hunyuan_v1_dense", "pair", {}, "it is not known where to scale queries of hunyuan_v1_dense"),
    ],
)
def test_what_a_family_cannot_carry_is_refused_by_name(family, rung, extra, message):
    with pytest.raises(UserError, match=message) as caught:
        gains_for(tiny_config(family, **extra).to_dict(), rung)
    assert str(caught.value).startswith("rope.query_gains: ")


def test_gains_need_folding(tmp_path):
    run = finished_run(tmp_path, "per_pair", settings=("rope.query_gains=head",))
    with pytest.raises(UserError, match=r"rope.query_gains: gains of the queries are in the weights"):
        export_overrides(run)
    never = parse_recipe(run.recipe.to_dict(), ["export.fold=never"])
    with pytest.raises(UserError, match=r"export.fold: never"):
        plan(never, BaseModel(never.base))


def test_untouched_is_the_base_and_detach_restores_it():
    model, rotary = tuned_model("llama", "pair_phase")
    with torch.no_grad():
        for parameter in rotary.parameters():
            parameter.normal_(0, 0.3)
        tuned = model(IDS, use_cache=False).logits
        with base_model_active(rotary):
            base = model(IDS, use_cache=False).logits
        again = model(IDS, use_cache=False).logits
        learned = rotary.learned()
        detach(model)
        plain = model(IDS, use_cache=False).logits
        attach_fixed(model, lambda length: (learned.inv_freq(), learned.attention_factor), learned.folds)
        fixed = model(IDS, use_cache=False).logits
    assert torch.equal(base, plain)
    assert torch.equal(again, tuned)
    assert (tuned - base).abs().max() > 1e-2
    torch.testing.assert_close(fixed, tuned, rtol=0, atol=1e-4)


def test_gains_of_a_bfloat16_model_are_multiplied_in_float32():
    """In bfloat16 a gain of 1.001 would be 1: small steps would not be seen."""
    model, rotary = tuned_model("llama", "head")
    model.to(torch.bfloat16)
    assert rotary.gains.log_gain.dtype == torch.float32
    site = rotary.gains.site
    x = torch.randn(1, 5, 64).bfloat16()
    product = scaled(x, site, torch.full((4, 8), 1.001))
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, x.float() * 1.001)


def test_an_adapter_for_a_7b_model_stays_small():
    config = tiny_config(
        "llama", hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32
    ).to_dict()
    for rung in RUNGS:
        gains = gains_for(config, rung)
        assert sum(p.numel() * p.element_size() for p in gains.parameters()) < 2**20


def test_stock_models_load_it_without_our_code(tmp_path):
    """The exported weights differ from the base's in the query projections alone."""
    run = finished_run(tmp_path, "per_pair", settings=("rope.query_gains=pair_phase",))
    target = export(run)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(target).state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere", "phi3"])
def test_gains_alone_leave_yarn_as_published(tmp_path, family):
    """`frequencies: fixed`: the config is plain YaRN at the recipe's factor, and only gains move."""
    rung = "pair" if SITES[family].groups == 1 else "pair_phase"
    settings = ("rope.frequencies=fixed", f"rope.query_gains={rung}")
    tree = recipe_tree(save_tiny(tmp_path / "base", family), tmp_path, steps=2)
    if family == "phi3":
        named = enumerate(("a.jsonl", "b.jsonl"), 3)
        ids = [write_documents(tmp_path / name, [700], seed=seed, ids=True) for seed, name in named]
        tree["data"] |= {"train": [str(ids[0])], "heldout": [str(ids[1])]}
    run = Run(parse_recipe(tree, list(settings)), tmp_path / "run")
    train(run)
    numbers = load_file(run.numbers_path)
    assert numbers["log_temperature"].item() == 0
    assert bool((numbers["gains.log_gain"] != 0).all())
    counted = json.loads((run.folder / "learned.json").read_text())["numbers"]
    assert set(counted) == {"gain", "phase"} - ({"phase"} if rung == "pair" else set())
    fidelity = json.loads((export(run) / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
    assert fidelity["attention_factor"] == pytest.approx(yarn_attention_factor(4.0), rel=1e-5)
    facts = rope_facts(tiny_config(family))
    expected = yarn_inv_freq(facts.theta, facts.dim, 4.0, YarnRamp(NATIVE))
    torch.testing.assert_close(torch.tensor(fidelity["inv_freq"]), expected, rtol=1e-6, atol=0)
    if family != "phi3":  # its config class accepts only longrope
        assert fidelity["rope_parameters"]["rope_type"] == "yarn"
        assert fidelity["rope_parameters"]["factor"] == 4.0


def test_yarn_alone_learns_nothing(tmp_path):
    with pytest.raises(RecipeError, match="rope.frequencies: with fixed frequencies there is nothing to learn"):
        parse_recipe(recipe_tree(tmp_path, tmp_path), ["rope.frequencies=fixed"])
