"""Gemma 4 and LFM3, whose configs carry another theta only: theta in them, gains in the norm, all else refused."""

import copy
import json

import pytest
import torch
import yaml
from finite_differences import slope_errors
from safetensors.torch import load_file
from tiny import NATIVE, SMALL, THETA_ONLY, VOCABULARY, finished_run, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrapped import THETA_ONLY_SIZES, image_inputs, save_wrapped, wrapped_model
from yarn_tune.errors import UserError
from yarn_tune.evaluation.methods import search_free_methods
from yarn_tune.export.checkpoint import export
from yarn_tune.files import save_tensors
from yarn_tune.models.base import BaseModel
from yarn_tune.models.rope_config import layout_of, rope_facts
from yarn_tune.models.token_loss import hidden_states
from yarn_tune.models.wrappers import decoder_layers
from yarn_tune.planning.starter import propose
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Base, Rope
from yarn_tune.runs.learned import learned_of
from yarn_tune.serving.readers import read
from yarn_tune.serving.stacks import STACKS
from yarn_tune.tunable.attachment import attach, attach_fixed, base_model_active
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.query_gains import gains_for
from yarn_tune.tunable.rotary import at_start

KIND = "gemma4_text"
SHARE = {"gemma4_text": 0.25, "gemma4_unified_text": 0.25, "lfm3": 0.5}
"""The rotated share of a head of 32 in full-attention layers (1 and 3), by model type."""
WRAPPED = ("gemma4", "gemma4_unified")
WINDOW, FACTOR = 4 * NATIVE, 4.0
IDS = torch.randint(1, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
SETTINGS = ("rope.init=ntk", "rope.query_gains=pair")
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
HALF = 16
"""Pairs of a full-attention head; the first rotate."""


def pairs_of(kind: str) -> int:
    """The number of rotated pairs."""
    return round(HALF * SHARE[kind])


def stretched(theta: float, pairs: int = 4) -> float:
    """The theta at which the slowest of the first pairs, theta^(-2 (pairs - 1) / 32), is `FACTOR` times slower."""
    return theta * FACTOR ** (HALF / (pairs - 1))


def with_theta(kind: str, theta: float):
    """The stock model under a config with another theta in full-attention layers."""
    section = {"rope_type": "proportional", "partial_rotary_factor": SHARE[kind], "rope_theta": theta}
    return tiny_model(kind, rope_parameters={"full_attention": section, "sliding_attention": dict(PLAIN)})


def tuned(kind: str, gains: str = "pair", init: str = "ntk"):
    model = tiny_model(kind)
    start = Start.of(rope_facts(model.config), Rope(window=WINDOW, frequencies="fixed", init=init, query_gains=gains))
    return model, attach(model, start, "fixed", [gains_for(model.config.to_dict(), gains)])


def test_every_such_family_is_tested():
    assert {*SHARE} == {*THETA_ONLY}
    assert {*WRAPPED} == {*THETA_ONLY_SIZES}


@pytest.mark.parametrize("kind", SHARE)
def test_the_start_is_the_stock_model_with_another_theta(kind):
    model, rotary = tuned(kind)
    with torch.no_grad():
        expected = with_theta(kind, stretched(1e6, pairs_of(kind)))(IDS, use_cache=False).logits
        found = model(IDS, use_cache=False).logits
        base = tiny_model(kind)(IDS, use_cache=False).logits
        assert (found - expected).abs().max() < 1e-4
        assert (found - base).abs().max() > 1e-2
        with base_model_active(rotary):
            assert torch.equal(model(IDS, use_cache=False).logits, base)


def loss_of(model):
    logits = model(IDS, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize(("kind", "gains"), [*((kind, "pair") for kind in SHARE), (KIND, "layer")])
def test_gradients_match_finite_differences(kind, gains):
    """In float64 (norms compute in float32); in Gemma 4 a tuned layer reuses keys and values of the other."""
    model = tiny_model(kind, dtype=torch.float64)
    start = Start.of(rope_facts(model.config), Rope(window=WINDOW, frequencies="fixed", init="ntk", query_gains=gains))
    rotary = attach(model, start, "fixed", [gains_for(model.config.to_dict(), gains)])
    assert rotary.count() == {"gain": 2 * (pairs_of(kind) if gains == "pair" else 1)}
    (numbers,) = rotary.trainable()
    (gradient,) = torch.autograd.grad(loss_of(model), [numbers])
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert slope_errors(lambda: loss_of(model), [numbers], [gradient], steps=[2e-3])[0] <= 2e-3


def check_folds(before: dict, after: dict, prefix: str, pairs: int = 4) -> None:
    """The norms of full-attention layers hold the gains of the rotated pairs; other tensors are the base's."""
    for name, tensor in before.items():
        if name not in (f"{prefix}layers.{layer}.self_attn.q_norm.weight" for layer in (1, 3)):
            assert torch.equal(after[name], tensor), name
            continue
        ratio = after[name] / tensor
        assert torch.allclose(ratio[:pairs], ratio[HALF : HALF + pairs], rtol=1e-6)
        assert (ratio[:pairs] != 1).all()
        rest = [*range(pairs, HALF), *range(HALF + pairs, 2 * HALF)]
        assert torch.equal(ratio[rest], torch.ones(len(rest)))


@pytest.mark.parametrize("kind", SHARE)
def test_the_export_is_a_stock_checkpoint(kind, tmp_path):
    run = finished_run(tmp_path, "fixed", kind, WINDOW, settings=SETTINGS, log_temperature=0.0)
    out = tmp_path / "export"
    export(run, out=out)
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    full = config["rope_parameters"]["full_attention"]
    assert full["rope_theta"] == pytest.approx(stretched(1e6, pairs_of(kind)), rel=1e-5)
    share = SHARE[kind]
    assert full == {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": full["rope_theta"]}
    changed = {key for key in config if config[key] != base.get(key)}
    assert changed == {"rope_parameters", "max_position_embeddings"}
    assert config["rope_parameters"]["sliding_attention"] == base["rope_parameters"]["sliding_attention"]
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out)]
    check_folds(*files, "model.", pairs_of(kind))
    served, model = AutoModelForCausalLM.from_pretrained(out).eval(), tuned(kind)
    model[1].load_numbers(load_file(run.numbers_path))
    with torch.no_grad():
        assert (served(IDS).logits - model[0](IDS, use_cache=False).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", WRAPPED)
def test_the_language_model_in_the_wrapper_gives_the_logits_of_the_whole(name):
    model, ids = wrapped_model(name), IDS % 100  # no placeholders of images
    with torch.no_grad():
        alone = model.get_output_embeddings()(hidden_states(model, ids))
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
    assert len(decoder_layers(model)) == 4


def whole(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the wrapper as any user calls it."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", WRAPPED)
def test_a_factor_of_1_leaves_images_as_they_were(name, tmp_path):
    base = save_wrapped(tmp_path / "base", name)
    settings = (*SETTINGS, "rope.factor=1")
    run = finished_run(tmp_path, "fixed", window=NATIVE, base=base, settings=settings, log_temperature=0.0)
    run.numbers_path.write_bytes(save_tensors(at_start(run.base, run.recipe.rope).numbers()))
    out = export(run)
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    served = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    before, after = (whole(model, image_inputs(name)) for model in (wrapped_model(name), served))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    changed = {**image_inputs(name), "pixel_values": image_inputs(name)["pixel_values"].flip(1)}
    assert (whole(served, changed) - after).abs().max() > 1e-3, "the image is read"


@pytest.mark.parametrize("name", WRAPPED)
def test_the_wrapper_is_exported_as_a_whole(name, tmp_path):
    save_wrapped(tmp_path / "base", name)
    run = finished_run(tmp_path, "fixed", window=WINDOW, base=tmp_path / "base", settings=SETTINGS, log_temperature=0.0)
    out = tmp_path / "export"
    export(run, out=out)
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", out))
    assert config["text_config"]["rope_parameters"]["full_attention"]["rope_theta"] == pytest.approx(
        stretched(1e6), rel=1e-5
    )
    assert {key for key in config if config[key] != base.get(key)} == {"text_config"}
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out)]
    check_folds(*files, "model.language_model.")
    served = AutoModelForImageTextToText.from_pretrained(out).eval()
    model, learned = run.base.load(), learned_of(run)
    before = whole(model, image_inputs(name))
    attach_fixed(model, lambda length: (learned.inv_freq(), learned.attention_factor), learned.folds)
    for inputs in ({"input_ids": IDS % 100}, image_inputs(name)):
        torch.testing.assert_close(whole(served, inputs), whole(model, inputs), rtol=0, atol=1e-4)
    assert (whole(model, image_inputs(name)) - before).abs().max() > 1e-2
    inv_freq = served.model.language_model.rotary_emb.full_attention_inv_freq
    assert torch.allclose(inv_freq[:4], stretched(1e6) ** -(torch.arange(4) / HALF))
    assert not inv_freq[4:].any()


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({}, "another theta only"),
        ({"frequencies": "per_pair", "init": "ntk"}, "another theta only"),
        ({"frequencies": "fixed", "query_gains": "pair"}, "rope.init to ntk or abf"),
        ({"frequencies": "fixed", "init": "ntk", "query_gains": "pair_phase"}, "normalises queries; use pair"),
        ({"frequencies": "fixed", "init": "ntk", "query_gains": "head"}, "share one norm"),
        ({"frequencies": "fixed", "init": "ntk", "qk_bias": True}, "not known to have biases"),
    ],
)
def test_what_its_configs_cannot_carry_is_refused(rope, words, tmp_path):
    base = BaseModel(Base(model=str(save_tiny(tmp_path / "base", KIND)), dtype="float32"))
    with pytest.raises(UserError, match=words):
        at_start(base, Rope(window=WINDOW, **rope))


def test_a_full_section_of_another_type_is_refused():
    config = tiny_config(KIND, rope_parameters={"full_attention": dict(PLAIN), "sliding_attention": dict(PLAIN)})
    with pytest.raises(UserError, match="another RoPE in full-attention layers than its releases"):
        rope_facts(config)


def test_init_proposes_gains_of_pairs_over_another_theta(tmp_path):
    base = save_tiny(tmp_path / "base", KIND)
    proposal = propose(str(base), WINDOW, ["train.jsonl"], ["heldout.jsonl"])
    recipe = proposal.recipe
    assert parse_recipe(yaml.safe_load(proposal.text), []).rope == recipe.rope
    assert (recipe.rope.init, recipe.rope.frequencies, recipe.rope.query_gains) == ("ntk", "fixed", "pair")


def test_compare_measures_only_methods_that_its_configs_can_carry():
    names = ["linear", "ntk", "dynamic", "abf"]
    found = {
        kind: [*search_free_methods(Start.of(rope_facts(tiny_config(kind)), Rope(window=WINDOW)), names)]
        for kind in (KIND, "llama")
    }
    assert found == {KIND: ["none", "ntk", "abf"], "llama": ["none", "linear", "ntk", "dynamic", "abf", "yarn"]}


@pytest.mark.rope_warnings  # transformers reads the factor, and calls it unrecognized
@pytest.mark.parametrize(("kind", "factor"), [(kind, factor) for kind in SHARE for factor in (1.0, 2.0)])
def test_readers_agree_with_transformers_module_for_both_spellings_of_the_head(kind, factor):
    """transformers saves `per_layer_config`, releases have `global_head_dim`; vLLM does not read `factor`."""
    section = {"rope_type": "proportional", "partial_rotary_factor": SHARE[kind], "rope_theta": 1e6, "factor": factor}
    sections = {"full_attention": section, "sliding_attention": dict(PLAIN)}
    saved = tiny_config(kind, rope_parameters=sections).to_dict()
    released = {**SMALL, **THETA_ONLY[kind], "model_type": kind, "rope_parameters": copy.deepcopy(sections)}
    expected = tiny_model(kind, rope_parameters=copy.deepcopy(sections)).model.rotary_emb.full_attention_inv_freq
    for config in (json.loads(json.dumps(saved)), released):
        assert layout_of(config).full_head_dim == 2 * HALF
        (own,) = read(STACKS["transformers"], config).tables["full_attention"]
        assert torch.allclose(own.inv_freq, expected, rtol=1e-6, atol=0)
        vllm = read(STACKS["vllm"], config)
        if kind in ("lfm3", "gemma4_unified_text"):  # the latter is in its multimodal model only
            assert vllm.refusal == f"it has no {kind}"
        else:
            (other,) = vllm.tables["full_attention"]
            assert torch.allclose(other.inv_freq, factor * expected, rtol=1e-6, atol=0)
