"""The scripts in examples/: the Trainers of transformers and TRL learn our numbers, and what they leave is exported."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import NATIVE, VOCABULARY, save_tiny, write_documents
from transformers import AutoModelForCausalLM
from yarn_tune.adapter.model import YarnTuneConfig
from yarn_tune.cli.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import hf_trainer
import trl_sft

EXAMPLES = {"hf_trainer": (hf_trainer.main, ["--rows", "2"]), "trl_sft": (trl_sft.main, [])}
NAMES = {"log_factor", "log_temperature", "log_gain"}
IDS = torch.randint(1, VOCABULARY, (2, 4 * NATIVE), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and documents."""
    made = tmp_path_factory.mktemp("trainers")
    save_tiny(made / "base")
    write_documents(made / "documents.jsonl", [700, 300, 90, 40, 100, 120, 33, 60])
    return made


@pytest.fixture(scope="module", params=sorted(EXAMPLES))
def trained(request, folder):
    """(name, output, trainer after four steps)."""
    output = folder / request.param
    return request.param, output, run(request.param, folder, output)


def run(name, folder, output, *more):
    script, own = EXAMPLES[name]
    given = [str(folder / "base"), str(folder / "documents.jsonl"), str(output), "--window", "256"]
    settings = ["--query-gains", "head", "--steps", "4", "--save-steps", "2", "--learning-rate", "0.01"]
    return script([*given, *settings, *own, *more])


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_only_our_numbers_learn(trained, folder):
    _, output, trainer = trained
    learning = {name.rpartition(".")[2]: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(learning) == NAMES
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert all(bool((p != 0).all()) for p in learning.values())
    base = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    kept = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == NAMES


def test_the_loss_falls(trained):
    _, _, trainer = trained
    model, start = trainer.model, YarnTuneConfig(window=256)
    batches = list(trainer.get_train_dataloader())

    def loss():
        with torch.no_grad():
            return sum(trainer.compute_loss(model, dict(batch)).item() for batch in batches)

    after = loss()
    model.add_adapter("start", start)
    model.set_adapter("start")
    assert after < loss()
    model.delete_adapter("start")
    model.set_adapter("default")


def test_packed_documents_do_not_see_each_other(trained):
    """The loss of a packed row is that of its documents, read one by one."""
    _, _, trainer = trained
    batch = next(b for b in trainer.get_train_dataloader() if (b["position_ids"] == 0).sum() > 1)
    with torch.no_grad():
        packed = trainer.compute_loss(trainer.model, dict(batch)).item()
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    nats = count = 0
    for begin, end in zip(starts, starts[1:], strict=False):
        ids = batch["input_ids"][:, begin:end]
        with torch.no_grad():
            lines = trainer.model(ids, use_cache=False).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(lines, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert packed == pytest.approx(nats / count, rel=1e-5)


def test_a_resumed_run_ends_with_the_same_values(trained, folder, tmp_path):
    name, output, _ = trained
    shutil.copytree(output / "checkpoint-2", tmp_path / "checkpoint-2")
    run(name, folder, tmp_path, "--resume")
    straight, resumed = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (output, tmp_path))
    halfway = load_file(output / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not any(torch.equal(straight[name], halfway[name]) for name in straight)


def test_the_result_is_merged_and_exported(trained, folder, tmp_path, capsys):
    _, output, _ = trained
    adapter = str(output / "adapter")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)
    expected = logits(tuned)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # The merge settles the numbers, which moves frequencies by up to 1e-6 of their value.
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-3)
    assert (logits(AutoModelForCausalLM.from_pretrained(folder / "base")) - expected).abs().max() > 0.1
    assert main(["export", adapter, "--json"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(output / "adapter" / "export")
    assert torch.equal(logits(exported), logits(merged))
    assert " steps on " not in (output / "adapter" / "export" / "README.md").read_text()
    capsys.readouterr()
