"""Base checkpoints that are incomplete, foreign or malicious: refused by name, and nothing of them is run or read."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import finished_run, recipe_tree, save_tiny
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationMethod
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.models.checkpoint_files import kept_digest, quantisation_of
from yarn_tune.models.loading import load_model
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny(tmp_path / "base")


def change_weights(base: Path, change) -> None:
    weights = load_file(base / "model.safetensors")
    save_file(change(weights), base / "model.safetensors", metadata={"format": "pt"})


def index_of(base: Path, name: str) -> None:
    """An index that names one file for every tensor."""
    names = dict.fromkeys(load_file(base / "model.safetensors"), name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if n != QUERY}, f"are missing, and would be random: {QUERY}"),
        (lambda w: {n.replace("self_attn", "attn"): t for n, t in w.items()}, "are missing, and would be random"),
        (
            lambda w: w | {"model.layers.0.extra.weight": torch.ones(2)},
            "are not of its model class: model.layers.0.extra",
        ),
        (lambda w: w | {NORM: torch.ones(7)}, f"{NORM}|could not be loaded"),
    ],
    ids=["missing", "renamed", "unexpected", "shape"],
)
def test_weights_that_are_not_the_models_are_named(base, change, message):
    """transformers warns of these, and goes on with random weights."""
    change_weights(base, change)
    with pytest.raises(UserError, match=message):
        load_model(str(base), dtype="float32")


def test_a_base_with_missing_weights_is_not_tuned_measured_or_compared(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_weights(base, lambda w: {n: t for n, t in w.items() if n != QUERY})
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_tree(base, tmp_path)))
    documents = ["heldout.jsonl", "--length", "128", "--dtype", "float32"]
    for command in (["train", "recipe.yaml"], ["compare", "recipe.yaml"], ["eval", str(base), *documents]):
        assert main(command) == 2
        assert f"are missing, and would be random: {QUERY}" in capsys.readouterr().err


def test_a_stray_adapter_is_not_loaded(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json makes this folder an adapter, not a base"):
        load_model(str(base))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/passwd", "missing.safetensors"]
)
def test_an_index_names_only_safetensors_of_its_folder(base, tmp_path, name):
    """A pickle would be read though `use_safetensors` is set; a path would leave the folder."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    index_of(base, name)
    (tmp_path / "elsewhere").mkdir()
    (base / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"only safetensors files in the same folder are read|is missing; complete"):
        load_model(str(base))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", "[" * 100_000])
def test_a_damaged_index(base, content):
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        load_model(str(base))


def test_a_link_out_of_the_folder_is_neither_read_nor_exported(tmp_path, capsys):
    run = finished_run(tmp_path, "scale")
    base = tmp_path / "base"
    secret = tmp_path / "secret"
    secret.write_text("not for the hub")
    (base / "LICENSE").symlink_to(secret)
    made = export(run)
    assert f"LICENSE is left out of the export: it is a link to {secret}" in capsys.readouterr().err
    assert not (made / "LICENSE").exists()
    (base / "LICENSE").unlink()
    (base / "LICENSE").symlink_to("config.json")
    assert (export(run) / "LICENSE").read_text() == (base / "config.json").read_text()
    (base / "model.safetensors").rename(tmp_path / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match=r"model.safetensors is a link to .*, outside of the checkpoint's folder"):
        export(run)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--lab--base" / "snapshots" / "abc"
    blobs = tmp_path / "models--lab--base" / "blobs"
    save_tiny(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert load_model(str(snapshot), dtype="float32").num_parameters() > 0


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_does_not_choose_the_attention_kernel(tmp_path, monkeypatch, key):
    """It may name a repository of compiled code, which transformers would download and run."""
    run = finished_run(tmp_path, "scale")
    path = tmp_path / "base" / "config.json"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base").config._attn_implementation
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "lab/kernel"}))
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: pytest.fail("a kernel was asked for")
    )
    assert load_model(str(tmp_path / "base")).config._attn_implementation == stock
    assert key not in json.loads((export(run) / "config.json").read_text())


def test_a_digest_is_computed_again_for_a_file_that_was_replaced(tmp_path, monkeypatch):
    """Also under the same size and modification time."""
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first, times = kept_digest(path), path.stat()
    assert kept_digest(path) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert kept_digest(path) != first
    (kept,) = [p for p in (tmp_path / "cache" / "digests").iterdir() if json.loads(p.read_text())["digest"] == first]
    kept.write_text(kept.read_text().replace(first[:8], "0" * 8))
    path.write_bytes(b"one")
    assert kept_digest(path) == first


# Quantised bases.

METHODS = ({"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"},
           {"quant_method": "awq"}, {"quant_method": "compressed-tensors"}, {"quant_method": "torchao"})  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["quant_method"])
@pytest.mark.parametrize("setting", ["rope.query_gains=head", "lora.rank=2", "export.fold=always"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_nothing_is_folded_into_quantised_weights(tmp_path, monkeypatch, capsys, method, setting, command):
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_tree(base, tmp_path)))
    assert main([command, "recipe.yaml", "rope.frequencies=scale", setting]) == 2
    said = capsys.readouterr().err
    assert f"quantised base ({method['quant_method']})" in said
    assert "tune the unquantised base, then quantise the export" in said


def test_the_method_of_a_model_in_memory_is_named_as_in_its_config():
    """transformers keeps an enum in the config of a loaded model."""
    config = {"quantization_config": {"quant_method": QuantizationMethod.BITS_AND_BYTES}}
    assert quantisation_of(config) == "bitsandbytes"


def fp8_base(folder: Path, family: str) -> Path:
    """A base whose matrices are stored as float8 with a scale per block, as DeepSeek and Qwen publish them."""
    base = save_tiny(folder, family)
    weights, stored = load_file(base / "model.safetensors"), {}
    for name, tensor in weights.items():
        if "_proj" in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            stored[name] = tensor
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return base


def test_numbers_in_the_config_are_exported_over_quantised_weights(tmp_path):
    """Nothing is folded, so the weights are the base's, byte for byte."""
    base = fp8_base(tmp_path / "base", "llama")
    train(Run(parse_recipe(recipe_tree(base, tmp_path), ["rope.frequencies=scale", "train.steps=1"]), tmp_path / "one"))
    run = finished_run(tmp_path, "scale", base=base)
    target = export(run)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert verify(str(target)).passed


def test_gains_in_a_norm_are_exported_over_quantised_weights(tmp_path):
    """Qwen3 has a norm between the projection and the rotation, which stays a plain float."""
    base = fp8_base(tmp_path / "base", "qwen3")
    run = finished_run(tmp_path, "scale", "qwen3", base=base, settings=("rope.query_gains=layer",))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, export(run)))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(3)}
