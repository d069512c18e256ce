"""LoRA beside the learned numbers: no change at the start, merged exactly, away without a trace."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import NATIVE, VOCABULARY, recipe_tree, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from yarn_tune.errors import UserError
from yarn_tune.evaluation.comparison import compare
from yarn_tune.export.checkpoint import export
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.recipe.loading import RecipeError, parse_recipe
from yarn_tune.recipe.schema import Lora, Rope
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import TunedRow, learned_of, tuned_row
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach, base_model_active, detach
from yarn_tune.tunable.lora import factors_of, lora_size, with_lora
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.query_gains import gains_for

IDS = torch.randint(1, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
LORA = ("lora.rank=4", "rope.query_gains=pair_phase", "train.learning_rate={lora: 0.02}")


def tuned(dtype=torch.float32, lora=True):
    model = tiny_model(dtype=dtype)
    start = Start.of(rope_facts(model.config), Rope(window=4 * NATIVE))
    gains = [gains_for(model.config.to_dict(), "head")]
    return model, attach(model, start, "per_pair", gains, Lora(rank=4) if lora else None)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_the_start_is_yarn_and_every_factor_learns():
    expected = logits(tuned(lora=False)[0])
    model, rotary = tuned()
    assert torch.equal(logits(model), expected)
    assert rotary.count()["lora"] == 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    with torch.no_grad():
        for parameter in rotary.lora.parameters.values():
            parameter.add_(0.02)
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert all(bool((p.grad != 0).any()) for p in rotary.trainable())
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in rotary.lora.parameters.values()}


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["layers.1.self_attn.v_proj"], ["q_proj", "v_proj", "gate_proj", "up_proj"]]
)
def test_its_numbers_and_inputs_are_counted_without_a_model(targets):
    lora = Lora(rank=3, targets=targets)
    model = tiny_model()
    read = []
    for name, module in model.named_modules():
        if any(name.endswith(target) for target in targets):
            module.register_forward_hook(lambda m, args, out: read.append(args[0]))
    logits(model)
    size = lora_size(model.config, lora)
    assert size.copied == sum(x.shape[-1] for x in read)
    assert size.shared == sum(x.shape[-1] for x in {id(x): x for x in read}.values())
    rotary = attach(model, Start.of(rope_facts(model.config), Rope(window=4 * NATIVE)), "per_pair", (), lora)
    assert size.numbers == rotary.count()["lora"]


def test_factors_stay_float32_in_a_bfloat16_model():
    _, rotary = tuned(torch.bfloat16)
    assert {p.dtype for p in rotary.trainable()} == {torch.float32}


def test_factors_go_where_the_other_numbers_go():
    """Under FSDP the model is still on the CPU then, and only its own weights are moved later."""
    _, rotary = tuned()
    moved = []
    rotary._apply(lambda tensor: moved.append(tensor.data_ptr()) or tensor)
    assert {p.data_ptr() for p in rotary.trainable()} <= set(moved)


def test_untouched_and_detached_it_is_the_base():
    plain = logits(tiny_model())
    model, rotary = tuned()
    with torch.no_grad():
        for parameter in rotary.trainable():
            parameter.normal_(0, 0.2)
    changed = logits(model)
    with base_model_active(rotary):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), changed)
    detach(model)
    assert torch.equal(logits(model), plain)
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_merged_weights_compute_what_adapters_do():
    model, rotary = tuned()
    with torch.no_grad():
        for parameter in rotary.lora.parameters.values():
            parameter.normal_(0, 0.2)
    expected = logits(model)
    factors = factors_of(rotary.numbers())
    detach(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain, _ = model, attach(model, rotary.start, "per_pair", rotary.adjustments)
    with with_lora(model, factors):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_run_is_exported_measured_and_resumed(tmp_path, dtype):
    base = tmp_path / "base"
    save_tiny(base)
    if dtype == "bfloat16":
        tiny_model(dtype=torch.bfloat16).save_pretrained(base)
    tree = recipe_tree(base, tmp_path, steps=3, checkpoint_every=1)
    tree["base"]["dtype"] = dtype
    run = Run(parse_recipe(tree, list(LORA)), tmp_path / "run")
    train(run)
    numbers = run.numbers_path.read_bytes()
    assert any(name.startswith("lora.") for name in load_file(run.numbers_path))
    run.numbers_path.unlink()
    (run.folder / "checkpoints" / "step-000003" / "state.json").unlink()
    train(run)
    assert run.numbers_path.read_bytes() == numbers
    target = export(run)
    fidelity = json.loads((target / "fidelity.json").read_text())
    rounds = dtype == "bfloat16"
    before = fidelity["max_abs_logit_difference" + ("_before_rounding" if rounds else "")]
    assert max(before.values()) <= 1e-4
    assert (max(fidelity["max_abs_logit_difference"].values()) > 1e-4) == rounds
    assert len(fidelity["learned"]["lora"]) == 12
    card = (target / "README.md").read_text()
    assert "but for gains and phases of the queries and " in card
    assert " and for LoRA merged into 12 tensors" in card
    assert "LoRA: merged into 12 tensors" in (target / "SERVING.md").read_text()
    assert not (target / "overrides.json").exists()
    if dtype == "float32":
        comparison = compare(run, {"tuned": tuned_row(run)}, [target])
        one, other = (comparison.row(name).nll[256] for name in ("tuned", "checkpoint run/export"))
        assert one == pytest.approx(other, abs=1e-5)


def test_measuring_without_lora_says_something_else(tmp_path):
    save_tiny(tmp_path / "base")
    tree = recipe_tree(tmp_path / "base", tmp_path, steps=3)
    run = Run(parse_recipe(tree, list(LORA)), tmp_path / "run")
    train(run)
    learned = learned_of(run)
    without = TunedRow(type(learned)(**{**vars(learned), "lora": None}), 0, 0.0)
    comparison = compare(
        run, {"tuned": TunedRow(learned, 0, 0.0), "tuned-without": without}, only=["tuned", "tuned-without"]
    )
    assert abs(comparison.row("tuned").nll[256] - comparison.row("tuned-without").nll[256]) > 1e-4


def test_what_cannot_be(tmp_path):
    save_tiny(tmp_path / "base")
    tree = recipe_tree(tmp_path / "base", tmp_path)
    with pytest.raises(UserError, match=r"lora.targets: this model has no query, qkv; it has .*o_proj, q_proj"):
        train(Run(parse_recipe(tree, ["lora.targets=[query, q_proj, qkv]"]), tmp_path / "run"))
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"lora.targets: .*{target} is not a linear module inside the layers"):
            train(Run(parse_recipe(tree, [f"lora.targets=[q_proj, {target}]"]), tmp_path / "other"))
    for setting, message in (("lora.rank=0", "lora.rank: must be at least 1"),):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(recipe_tree(tmp_path / "base", tmp_path), ["lora.targets=[q_proj]", setting])


def test_stock_transformers_loads_the_merged_checkpoint(tmp_path):
    save_tiny(tmp_path / "base")
    run = Run(parse_recipe(recipe_tree(tmp_path / "base", tmp_path, steps=2), list(LORA)), tmp_path / "run")
    train(run)
    merged = AutoModelForCausalLM.from_pretrained(export(run)).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert set(merged) == set(base)
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
