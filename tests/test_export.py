"""The exported checkpoint is the tuned model, for stock readers, or it is not there."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_SIZES, NATIVE, recipe_tree, save_tiny
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.export import export, learned_of
from yarn_tune.families import load_config, rope_facts
from yarn_tune.recipe import parse_recipe
from yarn_tune.serving import profiles
from yarn_tune.serving.profiles import Target, settle
from yarn_tune.train import Run, claim_folder
from yarn_tune.tunable import Start, TunableRotary


def finished_run(folder, learn: str = "frequency", family: str = "llama", window: int = 256, **offsets: float) -> Run:
    """A run that has learned something definite, without the training."""
    base = save_tiny(folder / "base", family)
    recipe = parse_recipe(recipe_tree(base, folder), [f"rope.learn={learn}", f"rope.window={window}"])
    run = Run(recipe, folder / "run")
    claim_folder(run)
    start = Start.of(rope_facts(load_config(str(base))), recipe.rope)
    rotary = TunableRotary(torch.nn.Identity(), start, learn)
    generator = torch.Generator().manual_seed(0)
    numbers = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in rotary.numbers().items()}
    numbers |= {name: torch.full_like(numbers[name], value) for name, value in offsets.items()}
    rotary.load_numbers(numbers)
    if learn != "frequency":
        settled = settle(rotary.learned(), Target.of_recipe(recipe))
        if settled.scale is not None:
            rotary.set_scale(settled.scale)
    save_file(rotary.numbers(), run.numbers_path)
    return run


@pytest.mark.parametrize("learn", ["scale", "ramp", "frequency"])
@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_every_family_reloads_as_it_was_tuned(tmp_path, family, learn):
    """export() itself reloads and compares in float32; here the verdict is read back."""
    run = finished_run(tmp_path, learn, family)
    if family == "cohere" and learn == "frequency":
        # vLLM and SGLang take lists of factors only for pairs that are halves of the head.
        with pytest.raises(UserError, match="vllm: does not load it: it takes longrope only where pairs are halves"):
            export(run)
        run = replace(run, recipe=parse_recipe(run.recipe.to_dict(), ["export.stacks=[transformers, lmdeploy]"]))
    target = export(run)
    fidelity = json.loads((target / "fidelity.json").read_text())
    differences = fidelity["max_abs_logit_difference"]
    window = AutoConfig.from_pretrained(target).max_position_embeddings
    assert window >= 256
    assert {int(n) for n in differences} >= {NATIVE // 2, NATIVE, NATIVE + 1, 256}
    assert max(differences.values()) <= 1e-4


@pytest.mark.parametrize("log_scale", [-0.5, 0.0, 0.3])
def test_factors_below_and_above_the_nominal_one(tmp_path, log_scale):
    run = finished_run(tmp_path, "scale", **{"offsets.log_scale": log_scale})
    config = json.loads((export(run) / "config.json").read_text())
    section = config["rope_parameters"]
    assert section["factor"] == pytest.approx(learned_of(run).scale, rel=1e-4)
    assert section["factor"] * section["original_max_position_embeddings"] >= 256
    assert config["max_position_embeddings"] == round(
        section["factor"] * section["original_max_position_embeddings"]
    ), "or transformers would warn"


def test_weights_are_the_bases_byte_for_byte(tmp_path):
    run = finished_run(tmp_path, "scale")
    target = export(run)

    def digest(folder):
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    assert digest(target) == digest(tmp_path / "base")
    window = AutoConfig.from_pretrained(target).max_position_embeddings
    assert AutoTokenizer.from_pretrained(target).model_max_length == window >= 256
    assert (target / "generation_config.json").is_file()
    assert "vllm serve" in (target / "SERVING.md").read_text()
    assert not list(run.folder.glob(".export*"))


@pytest.mark.rope_warnings
def test_an_export_without_the_learned_values_is_caught(tmp_path, monkeypatch):
    """Whatever key is lost on the way, the reload comparison fails and nothing is left behind."""
    run = finished_run(tmp_path, "ramp")
    original = profiles.serve
    for key in ("attention_factor", "beta_fast", "factor"):

        def lossy(learned, target, key=key):
            served = original(learned, target)
            if key == "attention_factor":
                del served.rope_parameters[key]
            else:
                served.rope_parameters[key] *= 1.1
            return served

        monkeypatch.setattr("yarn_tune.export.serve", lossy)
        with pytest.raises(CheckFailed, match="no checkpoint was written|warns"):
            export(run)
        assert not list(run.folder.glob("*export*"))


@pytest.mark.rope_warnings
def test_a_rope_warning_of_transformers_is_fatal(tmp_path, monkeypatch):
    run = finished_run(tmp_path, "scale")
    original = profiles.serve

    def odd(learned, target):
        served = original(learned, target)
        served.rope_parameters["speed"] = 3
        return served

    monkeypatch.setattr("yarn_tune.export.serve", odd)
    with pytest.raises(CheckFailed, match="warns about the exported rope section"):
        export(run)


def test_a_failed_export_keeps_the_one_before(tmp_path, monkeypatch):
    run = finished_run(tmp_path)
    target = export(run)
    before = (target / "config.json").read_text()
    monkeypatch.setattr("yarn_tune.export.compare_with_memory", lambda *a: (_ for _ in ()).throw(CheckFailed("no")))
    with pytest.raises(CheckFailed):
        export(run)
    assert (target / "config.json").read_text() == before
    monkeypatch.undo()
    assert export(run) == target


def test_overrides_serve_the_base_as_the_export_does(tmp_path):
    """The JSON for --hf-overrides replaces the whole attribute: theta must be in it."""
    run = finished_run(tmp_path, "ramp")
    overrides = json.loads(export(run, overrides_only=True).read_text())
    assert set(overrides) == {"rope_parameters", "max_position_embeddings"}
    assert not (run.folder / "export").exists()
    config = AutoConfig.from_pretrained(tmp_path / "base", **overrides)
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config).eval()
    exported = AutoModelForCausalLM.from_pretrained(export(run)).eval()
    ids = torch.arange(1, 101)[None] % 127
    with torch.no_grad():
        assert torch.equal(patched(ids).logits, exported(ids).logits)


def test_config_keys_of_old_readers(tmp_path):
    config = json.loads((export(finished_run(tmp_path, "scale")) / "config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "original_max_position_embeddings" not in config


def test_head_dim_is_written_where_the_config_has_null(tmp_path):
    """transformers' yarn reads a null head_dim as null and crashes (Mixtral)."""
    run = finished_run(tmp_path, "scale", "mixtral")
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    assert base["head_dim"] is None
    assert json.loads((export(run) / "config.json").read_text())["head_dim"] == 16


def test_nothing_learned_yet(tmp_path):
    run = finished_run(tmp_path)
    run.numbers_path.unlink()
    with pytest.raises(UserError, match="nothing learned here yet"):
        export(run)
