"""Multimodal models: where their language model is, and that training on text moves it alone."""

import json
import math
from dataclasses import replace

import pytest
import torch
from finite_differences import slope_errors
from safetensors.torch import load_file, save_file
from tiny import NATIVE, VOCABULARY
from transformers import AutoModelForImageTextToText
from wrapped import SIZES, THETA_ONLY_SIZES, image_inputs, save_wrapped, wrapped_config, wrapped_model
from yarn_tune.errors import UserError
from yarn_tune.models.base import BaseModel
from yarn_tune.models.loading import load_model
from yarn_tune.models.query_layout import query_site
from yarn_tune.models.rope_config import refusal, rope_facts
from yarn_tune.models.token_loss import NextToken, hidden_states
from yarn_tune.models.wrappers import (
    WRAPPERS,
    decoder_layers,
    language_tower,
    rotary_site,
    text_section,
    with_text_section,
)
from yarn_tune.planning.shape import Shape
from yarn_tune.recipe.schema import Base, Lora, Rope
from yarn_tune.tunable.attachment import attach, base_model_active, detach
from yarn_tune.tunable.kinds import adjustments_for
from yarn_tune.tunable.lora import lora_size, target_modules
from yarn_tune.tunable.parameters import Start

WINDOW = 4 * NATIVE
IDS = torch.randint(1, 100, (2, 200), generator=torch.Generator().manual_seed(1))
SHORT = torch.randint(1, 100, (4, 32), generator=torch.Generator().manual_seed(2))


def start_of(model, window: int = WINDOW) -> Start:
    return Start.of(rope_facts(model.config), Rope(window=window))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
    return NextToken(model)(ids, torch.arange(ids.shape[1]).expand_as(ids), labels) / (labels != -100).sum()


def whole(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the wrapper as any user calls it."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_every_wrapper_is_tested():
    assert {name.partition(":")[0] for name in SIZES} == set(WRAPPERS) - {*THETA_ONLY_SIZES}
    tested = {
        (name.partition(":")[0], wrapped_config(name).get_text_config().model_type)
        for name in SIZES | THETA_ONLY_SIZES  # the latter in tests/tunable/test_theta_only.py
    }
    assert tested == {(row.model_type, text) for row in WRAPPERS.values() for text in row.texts}


@pytest.mark.parametrize("name", SIZES)
def test_the_language_model_alone_gives_the_logits_of_the_whole(name):
    model = wrapped_model(name)
    with torch.no_grad():
        alone = model.get_output_embeddings()(hidden_states(model, IDS))
    torch.testing.assert_close(alone, whole(model, {"input_ids": IDS}), rtol=0, atol=1e-5)
    assert rotary_site(model)[0] is language_tower(model)
    assert len(decoder_layers(model)) == 3


@pytest.mark.parametrize("name", SIZES)
def test_the_start_is_stock_yarn_and_the_base_comes_back(name):
    """With an image in the prompt too: attached, the wrapper computes what stock YaRN does, detached what it did."""
    model, prompts = wrapped_model(name), [{"input_ids": IDS}, image_inputs(name)]
    before = [whole(model, prompt) for prompt in prompts]
    rotary = attach(model, start_of(model), "per_pair")
    during = [whole(model, prompt) for prompt in prompts]
    with base_model_active(rotary):
        assert all(torch.equal(whole(model, p), b) for p, b in zip(prompts, before, strict=True))
    detach(model)
    assert all(torch.equal(whole(model, p), b) for p, b in zip(prompts, before, strict=True))

    config = wrapped_config(name)
    text = config.get_text_config()
    facts = rope_facts(config)
    section = text.rope_parameters[facts.layer_kind] if facts.layer_kind else text.rope_parameters
    scaled = {"rope_type": "yarn", "factor": WINDOW / NATIVE, "original_max_position_embeddings": NATIVE}
    if facts.ramp:
        scaled = {"factor": WINDOW / facts.ramp.original}
    kept = facts.softmax_gain != 1.0  # on all logits; it stays the base's, and only rotated parts get YaRN's growth
    if kept:
        old, new = (1 + 0.1 * math.log(each) for each in (section["factor"], scaled["factor"]))
        scaled["attention_factor"] = new / old
    section |= scaled
    text.max_position_embeddings = WINDOW
    stock = AutoModelForImageTextToText.from_config(config).eval()
    stock.load_state_dict(model.state_dict())
    for ours, theirs in zip(decoder_layers(model), decoder_layers(stock), strict=True) if kept else ():
        assert theirs.self_attn.scaling > ours.self_attn.scaling
        theirs.self_attn.scaling = ours.self_attn.scaling
    for prompt, found in zip(prompts, during, strict=True):
        torch.testing.assert_close(found, whole(stock, prompt), rtol=0, atol=0)
    assert not torch.equal(during[0], before[0])


@pytest.mark.parametrize("name", SIZES)
def test_documents_packed_into_one_row_are_read_as_if_alone(name):
    """Positions begin again at the border; two documents must not see each other."""
    model = wrapped_model(name)
    one, two = SHORT[0, :20], SHORT[1, :12]
    positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
    with torch.no_grad():
        packed = hidden_states(model, torch.cat([one, two])[None], positions)[0]
        alone = torch.cat([hidden_states(model, each[None])[0] for each in (one, two)])
    if name.startswith("qwen3_5"):
        packed, alone = packed[:20], alone[:20]  # recurrent layers carry their state over the border, in any base
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SIZES)
def test_gradients_match_finite_differences(name):
    """Along the gradient itself; in float64, except for experts, whose products torch computes in float32 at most."""
    exact = not name.endswith(("moe", "mistral4", "kimi_k25"))
    model = wrapped_model(name, torch.float64 if exact else torch.float32)
    adjustments = adjustments_for(model.config.to_dict(), Rope(window=WINDOW, query_gains="pair"))
    rotary = attach(model, start_of(model), "per_pair", adjustments)
    with torch.no_grad():
        for parameter in rotary.parameters():
            parameter.add_(0.07)
    loss_of(model, SHORT).backward()
    gradients = [p.grad.double() for p in rotary.parameters()]
    assert all(bool(g.abs().max() > 0) for g in gradients)
    steps = (2e-3,) if exact else (5e-2, 1e-2, 2e-3)
    errors = slope_errors(lambda: loss_of(model, SHORT), rotary.parameters(), gradients, steps)
    assert min(errors) < (5e-3 if exact else 0.02)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_only_weights_of_the_language_model_hold_queries(name, tmp_path):
    """Names in memory and on disk; vision towers and speculative layers have names that end in the same way."""
    model = wrapped_model(name)
    site = query_site(model.config.to_dict())
    inside = f"{WRAPPERS[model.config.model_type].module}."
    held = [n for n, _ in model.named_parameters() if site.holds(n)]
    assert held
    assert all(n.startswith(inside) for n in held)
    saved = [n for n in load_file(save_wrapped(tmp_path / "base", name) / "model.safetensors") if site.holds(n)]
    assert len(saved) == len(held)
    for last in {n.rpartition("layers.")[2] for n in held}:
        for outside in (
            "mtp.layers",
            "vision_tower.vision_model.encoder.layers",
            "model.visual.layers",
            "visual.layers",
        ):
            assert not site.holds(f"{outside}.{last}")


@pytest.mark.parametrize("name", SIZES)
def test_lora_and_costs_see_the_language_model_alone(name):
    targets = ["q_b_proj", "o_proj"] if name.endswith(("mistral4", "kimi_k25")) else ["q_proj", "v_proj", "down_proj"]
    config, lora = wrapped_config(name), Lora(rank=2, targets=targets[: 2 + ("moe" not in name)])
    model = wrapped_model(name)
    found = target_modules(model, lora)
    assert all(n.startswith("model.language_model.") for n in found)
    assert lora_size(config, lora).numbers == sum(2 * (m.in_features + m.out_features) for m in found.values())
    shape = Shape.of(config)
    read = {*language_tower(model).parameters(), model.get_output_embeddings().weight}
    assert shape.unread == model.num_parameters() - sum(p.numel() for p in read) > 0


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5"])
def test_missing_and_unknown_weights_are_named(name, tmp_path):
    base = save_wrapped(tmp_path, name)
    tensors = load_file(base / "model.safetensors")
    vision = next(n for n in sorted(tensors) if "vis" in n)
    save_file(tensors | {"model.visual.extra.weight": torch.zeros(2)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"are not of its model class: model\.visual\.extra"):
        load_model(str(base), dtype="float32")
    del tensors[vision]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="are missing, and would be random"):
        load_model(str(base), dtype="float32")


def test_other_language_models_in_a_wrapper_are_refused():
    config = wrapped_config("mistral3", model_type="llama")
    assert "it is multimodal; extract its language model (model type llama)" in refusal(config)
    for kind, reason in (
        ("cohere2", "(model type cohere2) cannot be tuned: its full-attention layers have no positions"),
        ("glm4v_text", "transformers has no class for its language model (model type glm4v_text) alone"),
    ):
        assert reason in refusal(wrapped_config("mistral3", model_type=kind))
    text = wrapped_config("qwen3_vl").get_text_config()
    assert "no class for this language model alone" in refusal(text)


def test_old_configs_have_the_text_keys_at_the_top_level(tmp_path):
    """As Qwen2.5-VL's released config.json; the export keeps them there."""
    base = save_wrapped(tmp_path, "qwen2_5_vl")
    nested = json.loads((base / "config.json").read_text())
    text = nested.pop("text_config")
    section = text.pop("rope_parameters")
    flat = {**text, **nested, "rope_theta": 1e4}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": section["mrope_section"]}
    found = text_section(flat)
    assert found["model_type"] == "qwen2_5_vl_text"
    changed = with_text_section(flat, found | {"max_position_embeddings": 999})
    assert changed == flat | {"max_position_embeddings": 999}
    (base / "config.json").write_text(json.dumps(flat))
    facts = BaseModel(Base(model=str(base), dtype="float32")).facts
    kept = dict(facts.kept)
    assert kept["mrope_section"] == section["mrope_section"]
    assert replace(facts, kept=()) == replace(rope_facts(wrapped_config("qwen2_5_vl")), kept=())
    assert found["vocab_size"] == VOCABULARY
