"""Adapters that are bundled with a recipe, `recipes/adapters/NAME/`: exported and measured without training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import finished_run
from transformers import AutoModelForCausalLM
from yarn_tune.adapter.files import adapter_numbers, read_sections, write_adapter
from yarn_tune.cli.main import main
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.evaluation.perplexity import full_nll
from yarn_tune.evaluation.results import Comparison
from yarn_tune.models.base import BaseModel
from yarn_tune.recipe.bundled import copy_recipe
from yarn_tune.recipe.loading import load_recipe
from yarn_tune.recipe.schema import Data
from yarn_tune.tunable.rotary import at_start

ROOT = Path(__file__).parents[2]
DEMO, HELDOUT = ROOT / "data" / "tiny-base", ROOT / "data" / "sample" / "heldout.jsonl.gz"
MOST_BYTES = 300_000
SETTINGS = ("rope.query_gains=pair_phase", "rope.qk_bias=true", "export.stacks=[transformers, vllm]")


def check(folder: Path) -> None:
    """The convention: small, with a recipe of the same name that would learn these numbers on this base."""
    assert sum(path.stat().st_size for path in folder.rglob("*")) < MOST_BYTES
    recipe, sections = load_recipe(folder.parents[1] / f"{folder.name}.yaml"), read_sections(folder)
    assert sections.base == recipe.base
    kinds = ("window", "frequencies", "query_gains", "qk_bias", "method")
    assert [getattr(sections.rope, key) for key in kinds] == [getattr(recipe.rope, key) for key in kinds]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle as it is shipped: a recipe of the demo, with an adapter in the folder of its name."""
    top = tmp_path_factory.mktemp("bundle")
    run = finished_run(top / "made", window=2048, base=DEMO, settings=SETTINGS,
                       **{"biases.query_size": 0.3, "biases.key_size": 0.3})  # fmt: skip
    folder = top / "recipes" / "adapters" / "demo-2k"
    rotary = at_start(run.base, run.recipe.rope)
    rotary.load_numbers({name: 0.2 * tensor for name, tensor in load_file(run.numbers_path).items()})
    write_adapter(folder, run.recipe, rotary, "model.rotary_emb")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "data/where-it-was-trained"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copyfile(run.recipe_path, folder.parents[1] / "demo-2k.yaml")
    return folder


def test_the_convention(bundle, smollm2, monkeypatch):
    check(bundle)
    monkeypatch.chdir(ROOT)
    for folder in (ROOT / "recipes" / "adapters").glob("*/"):
        check(folder)
        rotary = at_start(BaseModel(read_sections(folder).base), read_sections(folder).rope)
        assert all(bool(tensor.isfinite().all()) for tensor in adapter_numbers(folder, rotary).values())


@pytest.fixture(scope="module")
def smollm2():
    """The base of SmolLM2's recipes; its script downloads a package of 98 MB the first time."""
    folder = ROOT / "data" / "smollm2" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        subprocess.run([sys.executable, ROOT / "data" / "smollm2" / "prepare.py"], check=True, cwd=ROOT)
    return folder


@pytest.mark.parametrize("name", ["smollm2-135m-16k", "smollm2-135m-32k"])
def test_a_shipped_adapter_gives_the_published_rows(smollm2, name, capsys, monkeypatch):
    """The beginning of each unlike document: the first position range of the published comparison.

    The documents of the sample are the beginnings of those that were measured. bfloat16 differs a little by machine.
    """
    monkeypatch.chdir(ROOT)
    found = Comparison.load(ROOT / f"benchmarks/results/{name}-compare.json")
    count = len(found.unlike.excerpts)
    command = ["data/sample/unlike.jsonl.gz", "--length", str(found.edges[1]), "--count", str(count), "--json"]
    assert main(["eval", f"recipes/adapters/{name}", *command]) == 0
    tuned = json.loads(capsys.readouterr().out)["mean"]
    assert tuned == pytest.approx(found.unlike.row("tuned").by_position[0], abs=3e-3)
    assert found.unlike.row("yarn").by_position[0] - tuned > 0.01


def test_export_and_eval_without_training(bundle, capsys, tmp_path):
    """The adapter on its base gives the NLL of its export, over 2048 tokens; the base is the recipe's."""
    out = tmp_path / "exported"
    assert main(["export", str(bundle), "--out", str(out)]) == 0
    command = [str(HELDOUT), "--length", "2048", "--count", "1", "--dtype", "float32", "--json"]
    capsys.readouterr()
    assert main(["eval", str(bundle), *command]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert main(["eval", str(out), *command]) == 0
    assert adapted["nll"] == pytest.approx(json.loads(capsys.readouterr().out)["nll"], abs=2e-3)  # rounded to bfloat16
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = BaseModel(read_sections(bundle).base)
    ((_, ids),) = heldout_excerpts(Data(train=[], heldout=[str(HELDOUT)]), base, 2048, 1, beginnings=True)
    assert adapted["mean"] == pytest.approx(full_nll(model, ids).mean().item(), abs=1e-3)
    assert main(["eval", str(DEMO), *command]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] > adapted["mean"] + 0.3  # the base fails beyond its window


def test_a_base_that_is_not_there_names_the_command_that_makes_it(bundle, tmp_path, capsys):
    folder = tmp_path / "recipes" / "adapters" / "demo-2k"
    shutil.copytree(bundle, folder)
    text = (bundle.parents[1] / "demo-2k.yaml").read_text().split("\n", 1)[1]
    text = text.replace(str(DEMO), "nowhere").replace("prepare: null", "prepare: python make.py", 1)
    (folder.parents[1] / "demo-2k.yaml").write_text(text)
    for command in (["export", str(folder)], ["eval", str(folder), str(HELDOUT), "--length", "64"]):
        assert main(command) == 2
        assert "'nowhere' is neither a checkpoint folder" in (said := capsys.readouterr().err)
        assert "run `python make.py` first" in said


def test_an_adapter_of_another_type_is_not_measured(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    assert main(["eval", str(tmp_path), str(HELDOUT), "--length", "64"]) == 2
    assert "peft_type 'LORA' is not yarn_tune's" in capsys.readouterr().err


def test_a_copied_recipe_brings_its_adapter(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("yarn_tune.recipe.bundled.home", lambda: bundle.parents[2])
    written = copy_recipe("demo-2k", tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    assert {"recipes/demo-2k.yaml", "recipes/adapters/demo-2k/adapter_config.json",
            "recipes/adapters/demo-2k/adapter_model.safetensors"} <= names  # fmt: skip
