"""The exported checkpoint is the tuned model, for stock readers, or it is not there."""

import hashlib
import importlib
import json
from dataclasses import replace

import pytest
import torch
from tiny import (
    FAMILY_SIZES,
    NATIVE,
    YARN_ALONE,
    finished_run,
    recipe_tree,
    save_tiny,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.evaluation.perplexity import full_nll
from yarn_tune.export.checkpoint import export, export_overrides, write_checkpoint
from yarn_tune.models.families import FAMILIES
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.runs.metrics import spent
from yarn_tune.serving import selection as profiles
from yarn_tune.serving.selection import Target
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train


@pytest.mark.parametrize("frequencies", ["scale", "ramp", "per_pair"])
@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_every_family_reloads_as_it_was_tuned(tmp_path, family, frequencies):
    """export() itself reloads and compares in float32; here the verdict is read back."""
    settings: tuple[str, ...] = ()
    by_vllm = "vllm" in Target.of(tiny_config(family).to_dict()).stacks
    if FAMILIES[family].latent and frequencies == "ramp" and by_vllm:
        with pytest.raises(UserError, match="vllm: frequencies off by"):  # it rounds the ends of DeepSeek's ramp
            finished_run(tmp_path, frequencies, family)
        settings = ("export.stacks=[transformers]",)
    if FAMILIES[family].queries is None and frequencies == "per_pair" and by_vllm:  # nothing can be folded for LMDeploy
        settings = ("export.stacks=[transformers, vllm, sglang]",)
    known = tmp_path / "base" if (tmp_path / "base").exists() else None
    run = finished_run(tmp_path, frequencies, family, base=known, settings=settings)
    if family in YARN_ALONE and frequencies == "per_pair" and by_vllm:
        reason = "it supports longrope only if pairs are halves|it builds the rope of .* itself, and supports only YaRN"
        with pytest.raises(UserError, match=f"vllm.*: does not load: ({reason})"):
            export(run)
        run = replace(run, recipe=parse_recipe(run.recipe.to_dict(), ["export.stacks=[transformers]"]))
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
    """If any key is lost, the comparison of the reloaded checkpoint fails and no files are left."""
    run = finished_run(tmp_path, "ramp")
    original = profiles.choose_encoding
    for key in ("attention_factor", "beta_fast", "factor"):

        def lossy(learned, target, key=key):
            served = original(learned, target)
            if key == "attention_factor":
                del served.rope_parameters[key]
            else:
                served.rope_parameters[key] *= 1.1
            return served

        monkeypatch.setattr("yarn_tune.export.checkpoint.choose_encoding", lossy)
        with pytest.raises(CheckFailed, match="no checkpoint was written|warns"):
            export(run)
        assert not list(run.folder.glob("*export*"))


@pytest.mark.rope_warnings
def test_a_rope_warning_of_transformers_is_fatal(tmp_path, monkeypatch):
    run = finished_run(tmp_path, "scale")
    original = profiles.choose_encoding

    def odd(learned, target):
        served = original(learned, target)
        served.rope_parameters["speed"] = 3
        return served

    monkeypatch.setattr("yarn_tune.export.checkpoint.choose_encoding", odd)
    with pytest.raises(CheckFailed, match="warns about the exported rope section"):
        export(run)


def test_a_failed_export_keeps_the_one_before(tmp_path, monkeypatch):
    run = finished_run(tmp_path)
    target = export(run)
    before = (target / "config.json").read_text()
    monkeypatch.setattr(
        "yarn_tune.export.checkpoint.compare_with_memory", lambda *a: (_ for _ in ()).throw(CheckFailed("no"))
    )
    with pytest.raises(CheckFailed):
        export(run)
    assert (target / "config.json").read_text() == before
    monkeypatch.undo()
    assert export(run) == target


def test_overrides_serve_the_base_as_the_export_does(tmp_path):
    """The JSON for --hf-overrides replaces the whole attribute: theta must be in it."""
    run = finished_run(tmp_path, "ramp")
    overrides = json.loads(export_overrides(run).read_text())
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


@pytest.mark.parametrize("setting", ["rope.window=512", "rope.frequencies=ramp", "lora.rank=2"])
def test_numbers_are_not_read_under_another_recipe(tmp_path, setting):
    """Offsets from another start would fit in shape, and be another model."""
    run = finished_run(tmp_path)
    other = replace(run, recipe=parse_recipe(run.recipe.to_dict(), [setting]))
    with pytest.raises(
        UserError, match=rf"learned with other settings.*\n  {setting.split('.')[0]}(\.\w+)?: "
    ) as caught:
        export(other)
    assert "name=" in str(caught.value)
    assert learned_of(run).window == 256


def test_where_a_run_began_does_not_matter_once_it_has_ended(tmp_path):
    """`rope.init` may be gone, or spelled from another folder."""
    run = finished_run(tmp_path)
    other = replace(run, recipe=parse_recipe(run.recipe.to_dict(), ["rope.init=../runs/earlier"]))
    assert learned_of(other).factors == learned_of(run).factors


def test_a_run_without_its_record(tmp_path):
    """What was spent is in metrics.jsonl, which did not come along, or not whole."""
    run = finished_run(tmp_path)
    record = run.folder / "metrics.jsonl"
    for content in (None, '{"step": 1}\n', "[1]\n", '{"tok'):
        record.unlink(missing_ok=True) if content is None else record.write_text(content)
        with pytest.raises(UserError, match="metrics.jsonl cannot be read"):
            spent(run.folder)


def test_nothing_learned_yet(tmp_path):
    run = finished_run(tmp_path)
    run.numbers_path.unlink()
    with pytest.raises(UserError, match="holds no finished run"):
        export(run)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "phi3", "cohere"])
def test_a_folded_export_is_the_tuned_model(tmp_path, family):
    """All of the temperature that stacks do not apply by themselves is in the queries, exactly."""
    frequencies = "per_pair" if family == "phi3" else "scale"
    target = export(finished_run(tmp_path, frequencies, family, settings=("export.fold=always",), log_temperature=-0.3))
    fidelity = json.loads((target / "fidelity.json").read_text())
    section = fidelity["rope_parameters"]
    assert "folded" in fidelity["carrier"]
    # Phi-3's config names the original length at the top, which vLLM takes for the window, so that it is the window.
    assert section.get("attention_factor", 1.0) == 1.0
    assert fidelity["fold"]["gain"] != 1.0
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
    page = (target / "SERVING.md").read_text()
    assert "folded into the queries" in page
    assert not (target / "overrides.json").exists()


@pytest.mark.parametrize("learned", ["query_gains=pair_phase", "query_gains=layer", "qk_bias=true"])
@pytest.mark.parametrize("frequencies", ["per_pair", "fixed", "scale"])
def test_where_weights_change_the_config_is_plain(tmp_path, frequencies, learned):
    """The lengths are those of the recipe, and no multiplier is written that readers would not compute themselves."""
    sizes = {"biases.query_size": 1.0, "biases.key_size": 1.0} if "bias" in learned else {}
    still = {"offsets.log_scale": 0.0} if frequencies != "per_pair" else {}
    hot = {"log_temperature": 0.0 if frequencies == "fixed" else -0.3}
    target = export(finished_run(tmp_path, frequencies, settings=(f"rope.{learned}",), **sizes, **still, **hot))
    config = AutoConfig.from_pretrained(target)
    section = dict(config.rope_parameters)
    assert (section["original_max_position_embeddings"], config.max_position_embeddings) == (NATIVE, 256)
    assert section["factor"] == 256 / NATIVE
    if frequencies != "per_pair":
        assert set(section) == {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast",
                                "beta_slow"}  # fmt: skip
        assert (section["beta_fast"], section["beta_slow"]) == (32, 1)
    written = ROPE_INIT_FUNCTIONS[section["rope_type"]](config, "cpu")
    config.rope_parameters = {key: value for key, value in section.items() if key != "attention_factor"}
    default = ROPE_INIT_FUNCTIONS[section["rope_type"]](config, "cpu")
    assert torch.equal(written[0], default[0])
    assert written[1] == pytest.approx(default[1], rel=1e-12)
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert fidelity["fold"]["gain"] == pytest.approx((fidelity["attention_factor"] / default[1]) ** 2)
    # Random biases as large as queries and keys make attention sharper, and float32 coarser.
    assert max(fidelity["max_abs_logit_difference"].values()) <= (5e-5 if "bias" in learned else 3e-5)
    page = (target / "SERVING.md").read_text()
    assert "as max_position_embeddings and the tokenizer's model_max_length say" in page
    if "bias" not in learned:  # LMDeploy is not known to read biases
        assert verify(str(target)).passed


def test_a_long_comparison_shows_its_progress(tmp_path, monkeypatch, capsys):
    run = finished_run(tmp_path, "scale", settings=("rope.query_gains=pair",))
    export(run)
    assert "export: the" not in capsys.readouterr().err
    monkeypatch.setattr("yarn_tune.export.fidelity.QUICK", 0.0)
    export(run)
    said = capsys.readouterr().err
    for model in ("the tuned model, float32", "the files, float32"):
        assert f"export: {model}: 100%" in said
    assert f"{run.recipe.rope.window} tokens" in said


def test_folding_into_bfloat16_says_what_rounding_costs(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    run = finished_run(tmp_path, "scale", base=base, settings=("export.fold=always",), log_temperature=-0.3)
    target = export(run)
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference_before_rounding"].values()) <= 1e-4
    assert 1e-3 < max(fidelity["max_abs_logit_difference"].values()) < 0.5, "of the files as they are"
    assert 1e-4 < fidelity["fold"]["rounding"] < 3e-3
    page = (target / "SERVING.md").read_text()
    assert "rounding to the checkpoint's dtype" in page
    cost = fidelity["rounding_cost"]
    exact = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    excerpts = [ids for _, ids in heldout_excerpts(run.recipe.data, run.base, 256, 2)]
    nll = torch.cat([full_nll(exact, ids) for ids in excerpts]).mean().item()
    assert cost["rounded"] == pytest.approx(nll, abs=1e-5)
    assert (cost["dtype"], cost["tokens"]) == ("bfloat16", 510)
    assert 0 < abs(cost["rounded"] - cost["exact"]) < 0.01
    assert f"changes the NLL by {cost['rounded'] - cost['exact']:+.4f}" in page
    assert f"by at most {max(fidelity['max_abs_logit_difference'].values()):.1e} (" in page


def test_serving_page_names_each_stack_asked_for(tmp_path):
    run = finished_run(tmp_path, "scale", settings=("export.stacks=[transformers, vllm, tgi]",))
    target = export(run)
    page, window = (target / "SERVING.md").read_text(), 256
    asked, others = page.split("## Other stacks")
    assert f"`vllm serve EXPORT --max-model-len {window}`" in asked
    assert "`text-generation-launcher --model-id EXPORT" in asked
    assert "sglang" not in asked
    assert "| sglang (0.5.23) |" in others
    assert "YaRN is not supported" in others
    assert "run `yarn-tune verify`" in others


def test_what_cannot_be_served_is_refused_before_training(tmp_path):
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path), ["export.stacks=[turbomind]"])
    with pytest.raises(UserError, match=r"turbomind: does not load: RuntimeError: Unsupported rope type"):
        train(Run(recipe, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_what_float32_alone_makes_is_told_from_a_mistake(tmp_path, monkeypatch, fold):
    """With the weights in memory folded too there is no noise, in float64 little; a mistake still shows."""
    run = finished_run(tmp_path, "per_pair", settings=("rope.query_gains=pair_phase", f"export.fold={fold}"))
    fidelity = json.loads((export(run) / "fidelity.json").read_text())
    noise = fidelity["max_abs_logit_difference"]
    assert "float32_noise_of_the_fold" not in fidelity
    strict = replace(run, recipe=parse_recipe(run.recipe.to_dict(), [f"export.tolerance={0.7 * max(noise.values())}"]))
    fidelity = json.loads((export(strict) / "fidelity.json").read_text())
    assert fidelity["float32_noise_of_the_fold"] == noise
    noisy = [n for n in noise if noise[n] > 0.7 * max(noise.values())]
    assert max(fidelity["max_abs_logit_difference"][n] for n in noisy) <= 0.1 * max(noise.values())
    assert max(fidelity["max_abs_logit_difference_float64"].values()) < 0.7 * max(noise.values())
    run = strict
    original = write_checkpoint

    def lossy(base, learned, served, target, folder):
        done = original(base, learned, served, target, folder)
        config = json.loads((folder / "config.json").read_text())
        for key in ("rope_parameters", "rope_scaling"):
            for factors in ("short_factor", "long_factor"):
                config[key][factors][-1] *= 1.001
        (folder / "config.json").write_text(json.dumps(config))
        return done

    monkeypatch.setattr("yarn_tune.export.checkpoint.write_checkpoint", lossy)
    with pytest.raises(CheckFailed, match="no checkpoint was written"):
        export(run)


def test_a_wrong_fold_is_not_taken_for_noise(tmp_path, monkeypatch):
    """Folded alike in memory and on disk, but not what was learned: the comparison in float64 finds it."""
    run = finished_run(tmp_path, "per_pair", settings=("rope.query_gains=pair_phase",))
    for name in ("yarn_tune.export.fidelity.fold_parameters", "yarn_tune.export.checkpoint.fold_checkpoint"):
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(module), function)

        def wrong(place, config, gain, folds, original=original):
            return original(place, config, gain * 1.01, folds)

        monkeypatch.setattr(name, wrong)
    with pytest.raises(CheckFailed, match="no checkpoint was written"):
        export(run)


def test_limits_of_the_bases_generation_do_not_survive(tmp_path):
    """`max_length` of the base, its own window, would make `generate` reject longer prompts."""
    base = save_tiny(tmp_path / "base")
    limits = {"max_length": NATIVE, "max_new_tokens": 20, "temperature": 0.7, "do_sample": True, "eos_token_id": None}
    (base / "generation_config.json").write_text(json.dumps(limits))
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"max_length": 20}))
    target = export(finished_run(tmp_path, base=base))
    kept = json.loads((target / "generation_config.json").read_text())
    assert kept == {"temperature": 0.7, "do_sample": True, "eos_token_id": None}
    assert "max_length" not in json.loads((target / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(target)
    found = model.generate(torch.randint(1, 100, (1, 100)), max_new_tokens=30, do_sample=False)
    assert found.shape == (1, 130)
    (base / "generation_config.json").write_text(json.dumps({"max_length": NATIVE}))
    with pytest.raises(ValueError, match="max_length"):  # what the limit does
        AutoModelForCausalLM.from_pretrained(base).generate(torch.randint(1, 100, (1, 100)), do_sample=False)


def test_larger_limits_of_generation_stay(tmp_path):
    base = save_tiny(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"max_length": 4096}))
    target = export(finished_run(tmp_path, base=base))
    assert json.loads((target / "generation_config.json").read_text()) == {"max_length": 4096}


def test_all_chat_templates_and_licences_are_kept(tmp_path):
    base = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "documents: {{ messages[0].content }}"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates" / "rag.jinja").is_file()
    for folder in ("LICENSES", "tokenizer_old", "onnx", "LICENSE_texts"):
        (base / folder).mkdir()
        (base / folder / "file").write_text("text")
    target = export(finished_run(tmp_path, base=base))
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
    assert (target / "LICENSES" / "file").read_text() == "text"
    assert not (target / "onnx").exists()
    assert verify(str(target)).passed
    (target / "additional_chat_templates" / "rag.jinja").write_text("changed")
    assert not verify(str(target)).passed
