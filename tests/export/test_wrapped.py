"""Exports of multimodal models: the wrapper with a longer window, every other tensor and key as in the base."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import NATIVE, finished_run, recipe_tree
from transformers import AutoConfig, AutoModelForImageTextToText
from wrapped import SIZES, image_inputs, save_wrapped, wrapped_model
from yarn_tune.adapter.files import read_sections
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export, export_overrides
from yarn_tune.files import read_tensors, save_tensors
from yarn_tune.models.query_layout import query_site
from yarn_tune.models.wrappers import language_tower
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import AdapterRun, Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach_fixed
from yarn_tune.tunable.lora import with_lora
from yarn_tune.tunable.rotary import at_start

IDS = torch.randint(1, 100, (1, 200), generator=torch.Generator().manual_seed(1))
TEXT_KEYS = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "rope_local_base_freq",
             "partial_rotary_factor", "llama_4_scaling"}  # fmt: skip
"""Keys of the language model that an export may change."""
LORA = ("lora.rank=2", "lora.targets=[q_proj, v_proj]")
ALIKE = {
    "qwen3_5": {
        "mtp.layers.0.self_attn.q_norm.weight": torch.randn(32),
        "mtp.layers.1.self_attn.q_norm.weight": torch.randn(32),
    },
}
"""Tensors of released checkpoints that transformers does not load, with names that end as folded ones do."""


def base_of(folder: Path, name: str) -> Path:
    base = save_wrapped(folder, name)
    if name in ALIKE:
        save_file(load_file(base / "model.safetensors") | ALIKE[name], base / "model.safetensors", {"format": "pt"})
    return base


def learned_run(folder: Path, name: str, settings: tuple[str, ...] = (), base: Path | None = None) -> Run:
    """A run that has learned a scale, gains per pair and, with `LORA`, changes of weights."""
    base = base or base_of(folder / "base", name)
    if LORA[0] not in settings:
        return finished_run(folder, "scale", base=base, settings=settings)
    run = finished_run(folder, "scale", base=base, settings=settings)
    model = run.base.load()
    numbers = read_tensors(run.numbers_path)
    generator = torch.Generator().manual_seed(1)
    for weight, module in model.named_modules():
        if weight.startswith("model.language_model.layers.") and weight.endswith((".q_proj", ".v_proj")):
            sizes = {"A": (2, module.in_features), "B": (module.out_features, 2)}
            numbers |= {
                f"lora.{weight}.weight.{f}": 0.1 * torch.randn(s, generator=generator) for f, s in sizes.items()
            }
    run.numbers_path.write_bytes(save_tensors(numbers))
    return run


def whole(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", SIZES)
def test_the_export_is_the_wrapper_with_what_was_learned(name, tmp_path):
    """Logits on text and on an image equal those of the tuned model; only folded and merged tensors change."""
    run = learned_run(tmp_path, name, ("rope.query_gains=pair", *LORA))
    target, learned = export(run), learned_of(run)
    stock = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
    tuned = run.base.load()
    with with_lora(tuned, learned.lora):
        attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor), learned.folds)
        for inputs in ({"input_ids": IDS}, image_inputs(name)):
            torch.testing.assert_close(whole(stock, inputs), whole(tuned, inputs), rtol=0, atol=1e-4)

    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", target))
    assert list(before) == list(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    site = query_site(json.loads((tmp_path / "base" / "config.json").read_text()))
    folded = {n for n in before if site.holds(n)}
    merged = {n for n in before if n.endswith((".q_proj.weight", ".v_proj.weight")) and ".layers." in n}
    merged = {n for n in merged if "vis" not in n and not n.startswith("mtp")}
    assert changed == folded | merged
    assert (target / "preprocessor_config.json").read_bytes() == (
        tmp_path / "base/preprocessor_config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", SIZES)
def test_without_folds_only_the_text_config_changes(name, tmp_path):
    run = learned_run(tmp_path, name)
    target = export(run)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", target))
    assert {k: v for k, v in before.items() if k != "text_config"} == {
        k: v for k, v in after.items() if k != "text_config"
    }
    old, new = before["text_config"], after["text_config"]
    assert {k: v for k, v in old.items() if k not in TEXT_KEYS} == {k: v for k, v in new.items() if k not in TEXT_KEYS}
    for key in ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta"):
        loaded = AutoConfig.from_pretrained(target).get_text_config().rope_parameters
        assert loaded.get(key) == old["rope_parameters"].get(key)
    assert new["max_position_embeddings"] >= 256
    apart = name in ("qwen2_vl", "qwen2_5_vl")  # vLLM computes their ramp over another length
    found = verify(str(target), ["transformers", "transformers-4.57", *([] if apart else ["vllm"])])
    unknown = {"not established"} if name.endswith("mistral4") else set()  # how vLLM scales its logits
    assert {line.status for line in found.lines} <= {"ok", "not run by this release"} | unknown
    if apart or unknown:
        with pytest.raises(UserError, match="vllm: not established" if unknown else "vllm: frequencies off by"):
            export_overrides(run)  # which are for vLLM
        return
    overrides = json.loads(export_overrides(run).read_text())
    config = AutoConfig.from_pretrained(tmp_path / "base")
    for key, value in overrides["text_config"].items():
        setattr(config.text_config, key, value)
    patched = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", config=config, dtype=torch.float32).eval()
    stock = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
    assert torch.equal(whole(patched, image_inputs(name)), whole(stock, image_inputs(name)))


@pytest.mark.parametrize("name", SIZES)
def test_an_identity_leaves_images_as_they_were(name, tmp_path):
    """The base's own factor and no temperature: the same logits with an image, to the last bit.

    Where the sum of both ends of YaRN's ramp rounds a frequency, within what that rounding explains.
    """
    factor = 2.0 if name.endswith(("ministral3", "mistral4", "kimi_k25")) else 1.0  # that of its own YaRN
    settings = (f"rope.factor={factor}",)
    run = finished_run(tmp_path, "scale", base=base_of(tmp_path / "base", name), window=NATIVE, settings=settings)
    run.numbers_path.write_bytes(save_tensors(at_start(run.base, run.recipe.rope).numbers()))
    base, stock = wrapped_model(name), AutoModelForImageTextToText.from_pretrained(export(run), dtype=torch.float32)
    before, after = (whole(model.eval(), image_inputs(name)) for model in (base, stock))
    tables = [dict(language_tower(model).rotary_emb.named_buffers()) for model in (base, stock)]
    rounded = [n for n, table in tables[0].items() if not torch.equal(table, tables[1][n])]
    for each in rounded:
        torch.testing.assert_close(tables[0][each], tables[1][each], rtol=1.2e-7, atol=0)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 if rounded else 0)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5", "kimi_k25"])
def test_a_run_trains_compares_and_exports(name, tmp_path):
    ids = name == "qwen3_5"  # its tokenizer class splits words in its own way
    tree = recipe_tree(base_of(tmp_path / "base", name), tmp_path, ids=ids, steps=2)
    targets = "lora.targets=[q_b_proj, o_proj]" if name == "kimi_k25" else LORA[1]
    recipe = parse_recipe(tree, ["rope.query_gains=pair", "rope.frequencies=scale", LORA[0], targets])
    run = Run(recipe, tmp_path / "run")
    train(run)
    learned = learned_of(run)
    assert learned.lora
    assert all(n.startswith("model.language_model.layers.") for n in learned.lora)
    target = export(run, anyway=True)
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) < 1e-4
    # The adapters that training wrote: exported, merged, and applied to the wrapper.
    inputs = image_inputs(name)
    stock = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
    folder = run.folder / "adapter"
    again = export(AdapterRun(read_sections(folder), folder))
    one, other = (load_file(at / "model.safetensors") for at in (again, target))
    assert all(torch.equal(tensor, other[n]) for n, tensor in one.items())

    def load():
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    lora = PeftModel.from_pretrained(load(), folder / "lora").merge_and_unload()
    merged = PeftModel.from_pretrained(lora, folder).merge_and_unload()
    torch.testing.assert_close(whole(merged, inputs), whole(stock, inputs), rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(whole(saved, inputs), whole(merged, inputs))
    applied = load()
    for beside in (folder, folder / "lora"):
        applied.load_adapter(beside, adapter_name=beside.name)
    applied.set_adapter(["adapter", "lora"])
    torch.testing.assert_close(whole(applied, inputs), whole(stock, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5"])
def test_factors_per_pair_need_stacks_that_keep_the_axes(name, tmp_path):
    """vLLM's longrope ignores mrope_section, so it would rotate images wrongly; transformers reads both."""
    base = save_wrapped(tmp_path / "base", name)
    with pytest.raises(UserError, match=r"sglang: does not load: under rope_type longrope it ignores mrope_section"):
        export(finished_run(tmp_path / "all", "per_pair", base=base))
    run = finished_run(tmp_path / "one", "per_pair", base=base, settings=("export.stacks=[transformers]",))
    stock = AutoModelForImageTextToText.from_pretrained(export(run), dtype=torch.float32).eval()
    tuned, learned = run.base.load(), learned_of(run)
    attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor))
    assert torch.equal(whole(stock, image_inputs(name)), whole(tuned, image_inputs(name)))


@pytest.mark.parametrize(("name", "prefix"), [("qwen2_5_vl", "model"), ("gemma3", "language_model.model")])
def test_tensors_under_the_names_of_transformers_5_are_folded_too(name, prefix, tmp_path):
    base = save_wrapped(tmp_path / "base", name)
    found = load_file(base / "model.safetensors")
    renamed = {}
    for key, tensor in found.items():
        tail = key.removeprefix(f"{prefix}.")
        inside = tail != key or key == "lm_head.weight"
        renamed[f"model.language_model.{tail}" if tail != key else key if inside else f"model.{key}"] = tensor
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    target = export(learned_run(tmp_path, name, ("rope.query_gains=pair", *LORA), base))
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) < 1e-4
    assert list(load_file(target / "model.safetensors")) == list(load_file(base / "model.safetensors"))


def test_a_config_with_the_text_keys_at_the_top_level_keeps_them_there(tmp_path):
    """As in the released Qwen2.5-VL."""
    base = save_wrapped(tmp_path / "base", "qwen2_5_vl")
    nested = json.loads((base / "config.json").read_text())
    text = nested.pop("text_config")
    section = text.pop("rope_parameters")
    flat = {**text, **nested, "rope_theta": 1e4}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": section["mrope_section"]}
    (base / "config.json").write_text(json.dumps(flat))
    run = finished_run(tmp_path, "scale", base=base)
    target = export(run)
    written = json.loads((target / "config.json").read_text())
    assert "text_config" not in written
    assert {k: v for k, v in written.items() if k not in TEXT_KEYS} == {
        k: v for k, v in flat.items() if k not in TEXT_KEYS
    }
    stock = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
    tuned, learned = run.base.load(), learned_of(run)
    attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor))
    for inputs in ({"input_ids": IDS}, image_inputs("qwen2_5_vl")):
        assert torch.equal(whole(stock, inputs), whole(tuned, inputs))
    assert {line.status for line in verify(str(target), ["transformers", "sglang"]).lines} == {"ok"}
    assert [line.status for line in verify(str(target), ["vllm"]).lines] == ["differs"], "its ramp is over 4 O"
    # Overrides name the nested config, which config objects have in any case; vLLM's ramp is that of the export.
    overrides = json.loads((target / "overrides.json").read_text())
    assert set(overrides) == {"text_config"}
    lines = [*verify(str(base), ["vllm"], overrides=overrides).lines, *verify(str(target), ["vllm"]).lines]
    assert lines[0].window == lines[1].window == overrides["text_config"]["max_position_embeddings"]
    assert lines[0].frequencies == pytest.approx(lines[1].frequencies)


def test_commands_take_a_multimodal_base(tmp_path, capsys):
    base = save_wrapped(tmp_path / "base", "qwen3_vl")
    recipe = tmp_path / "recipe.yaml"
    documents = recipe_tree(base, tmp_path)["data"]
    options = ["--window", "256", "--train", documents["train"][0], "--heldout", documents["heldout"][0]]
    assert main(["init", str(base), *options, "--out", str(recipe)]) == 0
    assert main(["plan", str(recipe)]) == 0
    assert "only the language model is tuned" in capsys.readouterr().out
