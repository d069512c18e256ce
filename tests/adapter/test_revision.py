"""The revision of an adapter's base: recorded, told about where another one is used; and exports to other places."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import finished_run, save_tiny, write_documents
from transformers import AutoModelForCausalLM
from yarn_tune.adapter import write_adapter
from yarn_tune.cli.main import main
from yarn_tune.export import prepare_upload
from yarn_tune.files import read_tensors
from yarn_tune.tunable import at_start

OLD, NEW = "a" * 40, "b" * 40
"""Two commits of the base; `main` is the second, and the tag v1 the first."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the hub with two commits of org/base, whose weights differ."""
    repo = tmp_path / "hub" / "models--org--base"
    save_tiny(repo / "snapshots" / OLD)
    shutil.copytree(repo / "snapshots" / OLD, repo / "snapshots" / NEW)
    weights = load_file(repo / "snapshots" / NEW / "model.safetensors")
    save_file(
        {k: 1.5 * v for k, v in weights.items()}, repo / "snapshots" / NEW / "model.safetensors", {"format": "pt"}
    )
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (repo / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def adapter_at(folder: Path, revision: str) -> Path:
    """An adapter of org/base at a revision, as a run writes it."""
    run = finished_run(folder, settings=("base.model=org/base", f"base.revision={revision}"), base=folder)
    rotary = at_start(run.base, run.recipe.rope)
    rotary.load_numbers(read_tensors(run.numbers_path))
    write_adapter(run.folder / "adapter", run.recipe, rotary, "model.rotary_emb")
    return run.folder / "adapter"


@pytest.mark.parametrize("recorded", [OLD, "v1"])
def test_another_revision_of_the_base_is_told_when_the_adapter_is_loaded(hub, tmp_path, recorded):
    folder = adapter_at(tmp_path / "run", recorded)
    with pytest.warns(UserWarning, match=f'learned on revision {recorded} of org/base, .*revision="{recorded}"'):
        newest = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained("org/base", revision=OLD, dtype=torch.float32)
    base.config._commit_hash = OLD  # as older releases of transformers note it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        right = PeftModel.from_pretrained(base, folder)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert (newest(ids).logits - right(ids).logits).abs().max() > 0.1


def test_the_newest_revision_is_not_told_where_it_is_the_recorded_one(hub, tmp_path):
    folder = adapter_at(tmp_path / "run", NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained("org/base", revision=OLD)
    base.config._commit_hash = OLD
    with pytest.warns(UserWarning, match=f"was loaded in revision {OLD}"):
        PeftModel.from_pretrained(base, folder)


def test_an_export_uses_the_recorded_revision_unless_another_is_given(hub, tmp_path, capsys):
    folder = adapter_at(tmp_path / "run", "v1")

    def exported(*options: str) -> tuple[torch.Tensor, str]:
        out = tmp_path / f"out{len(options)}"
        assert main(["export", str(folder), "--out", str(out), *options]) == 0
        return load_file(out / "model.safetensors")["lm_head.weight"], capsys.readouterr().err

    old, new = (load_file(hub / "snapshots" / each / "model.safetensors")["lm_head.weight"] for each in (OLD, NEW))
    weights, told = exported()
    assert torch.equal(weights, old)
    assert "WARNING" not in told
    card = (tmp_path / "out0" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model_revision"] == "v1"
    assert "org/base (revision v1), extended from 64 to 256 tokens" in card
    weights, told = exported("--revision", NEW)
    assert torch.equal(weights, new)
    assert f"records revision v1 of org/base, and {NEW} is used" in told


def test_a_read_only_adapter_is_exported_elsewhere(tmp_path, capsys, monkeypatch):
    run = finished_run(tmp_path / "run")
    rotary = at_start(run.base, run.recipe.rope)
    rotary.load_numbers(read_tensors(run.numbers_path))
    write_adapter(tmp_path / "adapter", run.recipe, rotary, "model.rotary_emb")
    before = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    out = tmp_path / "made" / "merged"
    for _ in range(2):  # an earlier export is replaced
        assert main(["export", str(tmp_path / "adapter"), "--out", str(out)]) == 0
    assert "config.json" in {path.name for path in out.iterdir()}
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == before
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("kept")
    assert main(["export", "adapter", "--out", "mine"]) == 2
    assert "--out: mine exists and is no export of yarn_tune" in capsys.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "kept"
    assert main(["export", "adapter", "--out", "lines", "--overrides-only"]) == 0
    assert "rope_parameters" in json.loads((tmp_path / "lines" / "overrides.json").read_text())


def test_the_card_of_an_adapter_loads_the_recorded_revision(hub, tmp_path, capsys):
    folder = adapter_at(tmp_path / "run", OLD)

    def card(revision: str | None) -> tuple[str, dict, tuple[str, ...]]:
        made = prepare_upload(folder, "lab/adapter", revision=revision)
        config = made.files["adapter_config.json"]
        written = json.loads(config if isinstance(config, bytes) else config.read_text())
        return made.files["README.md"].decode(), written, made.notes

    text, config, notes = card(None)
    assert yaml.safe_load(text.split("---")[1])["base_model_revision"] == OLD == config["revision"]
    assert f'from_pretrained("org/base", revision="{OLD}")' in text
    assert not notes
    text, config, notes = card(NEW)
    assert f'revision="{NEW}"' in text
    assert config["revision"] == NEW
    assert notes == (
        f"{folder}/adapter_config.json records revision {OLD} of the base; {NEW} is uploaded (--revision).",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": None}))
    assert "No revision of org/base is recorded" in card(None)[2][0]
    assert card(NEW)[1]["revision"] == NEW
    assert main(["push", str(folder), "lab/adapter", "--revision", OLD]) == 0
    assert "Nothing was uploaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["verify"], ["eval", "DOCUMENTS", "--length", "8"], ["retrieve", "DOCUMENTS", "--lengths", "64"]]
)
def test_a_folder_has_no_revision_and_an_adapter_names_its_base(hub, tmp_path, capsys, command):
    base, adapter = save_tiny(tmp_path / "base"), adapter_at(tmp_path / "run", "v1")
    for checkpoint, message in (
        (base, f"--revision: {base} is a folder, which has no revisions"),
        (adapter, f"it is an adapter of org/base (revision v1); `yarn-tune export {adapter}`"),
    ):
        if checkpoint == adapter and command[0] == "eval":
            continue  # it measures adapters
        assert main([command[0], str(checkpoint), *command[1:], "--revision", "v1"]) == 2
        assert message in capsys.readouterr().err


def test_eval_of_an_adapter_reads_the_recorded_revision_unless_another_is_given(hub, tmp_path, capsys):
    adapter, documents = adapter_at(tmp_path / "run", "v1"), write_documents(tmp_path / "more.jsonl", [300], seed=70)
    command = ["eval", str(adapter), str(documents), "--length", "200", "--dtype", "float32", "--json"]

    def measured(*options: str) -> tuple[float, str]:
        assert main([*command, *options]) == 0
        found = capsys.readouterr()
        return json.loads(found.out)["mean"], found.err

    (recorded, told), (old, _), (new, warned) = measured(), measured("--revision", OLD), measured("--revision", NEW)
    assert "WARNING" not in told
    assert recorded == old
    assert f"{adapter} records revision v1 of org/base, and {NEW} is used" in warned
    out = tmp_path / "export"
    assert main(["export", str(adapter), "--out", str(out), "--revision", NEW]) == 0
    capsys.readouterr()
    command[1] = str(out)
    assert measured()[0] == pytest.approx(new, abs=1e-5)
    assert abs(new - recorded) > 0.01
