"""The plan: what would stop a run or a comparison stops it; what is not here becomes a note."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny import finished_run, recipe_tree, save_tiny, tiny_config, write_metrics
from transformers import AutoConfig
from yarn_tune.data.heldout import excerpt_lengths
from yarn_tune.errors import UserError
from yarn_tune.models.base import BaseModel
from yarn_tune.planning.run_plan import plan
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Base
from yarn_tune.tunable.parameters import Start


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A recipe with held-out documents of 601 and 301 tokens."""
    folder = tmp_path_factory.mktemp("plan")
    return recipe_tree(save_tiny(folder / "base"), folder)


def planned_recipe(recipe, **options):
    return plan(recipe, BaseModel(recipe.base), **options)


def planned(tree, *settings):
    return planned_recipe(parse_recipe(tree, list(settings)))


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        (["rope.window=601"], 601),
        (["rope.window=602"], 602),
        (["rope.window=700", "eval.lengths=[601,64]"], 601),
        (["rope.window=700", "eval.lengths=[64,602]"], 602),
    ],
)
def test_heldout_documents_too_short_to_compare_on_stop_a_plan(tree, settings, longest):
    recipe = parse_recipe(tree, settings)
    start = Start.of(BaseModel(recipe.base).facts, recipe.rope)
    assert max(excerpt_lengths(recipe.eval, start.native, start.window)) == longest
    if longest <= 601:
        planned_recipe(recipe)
        return
    with pytest.raises(UserError, match="data.heldout: the longest of 2 documents has 601 tokens, fewer than the 602"):
        planned_recipe(recipe)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["data.heldout=[nowhere.txt]"], "data.heldout: no file matches nowhere.txt"),
        (
            ["data.heldout=[nowhere.txt]", "data.prepare=make documents"],
            "do not exist yet: run `make documents`",
        ),
        (["data.heldout=['hub:org/name']"], "held-out documents are streamed from the hub"),
    ],
)
def test_heldout_documents_that_are_not_here_are_a_note(tree, settings, note):
    assert any(note in line for line in planned(tree, *settings).notes)


def test_an_earlier_run_is_read_for_a_plan_or_a_note(tree, tmp_path):
    assert any(
        "rope.init: runs/stage-1 does not exist yet" in note for note in planned(tree, "rope.init=runs/stage-1").notes
    )
    first = finished_run(tmp_path / "first", base=Path(tree["base"]["model"]))
    write_metrics(first.folder, 3, tokens=512)
    notes = planned(tree, f"rope.init={first.folder}").notes
    assert f"rope.init: the run begins with the numbers learned in {first.folder}, from 1,536 tokens" in notes
    unfit = [f"rope.init={first.folder}", "rope.frequencies=scale"]
    with pytest.raises(UserError, match="rope.frequencies: per_pair there, scale here"):
        planned(tree, *unfit)
    # One that has begun needs it no more, and without the base nothing is looked at.
    assert (
        f"rope.init: the run began with the numbers learned in {first.folder}"
        in planned_recipe(parse_recipe(tree, unfit), has_checkpoint=True).notes
    )
    absent = ["base.model=./nowhere", "base.prepare=make base", *unfit]
    assert any("cannot be checked without the base" in note for note in planned(tree, *absent).notes)


def test_validation_rows_are_planned(tree):
    made = planned(tree, "train.decide=true", "data.row_tokens=128", "rope.frequencies=fixed", "rope.query_gains=pair")
    assert any(
        note.startswith("train.decide: the run ends with a decision on") and "of 1 documents that are held" in note
        for note in made.notes
    )
    with pytest.raises(UserError, match="data.validation: no file matches 'nowhere.txt'"):
        planned(tree, "train.decide=true", "data.validation=[nowhere.txt]")


def test_lora_is_counted(tree):
    """Memory counts the numbers of LoRA, their optimizer state, and what their gradient keeps."""
    plain, lora = planned(tree), planned(tree, "lora={rank: 2}")
    assert lora.learned_numbers == plain.learned_numbers | {"lora": 3 * 2 * (2 * (64 + 64) + 2 * (64 + 32))}
    assert f"{sum(lora.learned_numbers.values())} numbers" in lora.text()
    state = 16 * lora.learned_numbers["lora"] / 2**30
    assert lora.cost.weights_gib == pytest.approx(plain.cost.weights_gib + state, rel=1e-9)
    assert lora.cost.activations_gib > plain.cost.activations_gib
    with pytest.raises(UserError, match="lora.targets: this model has no query"):
        planned(tree, "lora.targets=[query, q_proj]")


def test_coverage_is_that_of_rows_as_they_are_cut(tree):
    assert planned(tree).coverage.untrained == 0
    for documents in ([], ["data.train=['hub:org/name']"]):
        short = planned(tree, "data.lengths=[32, 64]", *documents)
        assert short.coverage.untrained == 0.75
        assert any("WARNING: 75% of the target window's distances are never trained" in note for note in short.notes)
        mixed = planned(tree, "data.lengths=[64, 256]", *documents)
        assert mixed.coverage.untrained == 0
        near, far = mixed.coverage.pairs[0], mixed.coverage.pairs[-1]
        whole = planned(tree, *documents).coverage
        # Far pairs come from the whole row alone; near ones from its four pieces too.
        assert far == whole.pairs[-1]
        assert near > 1.8 * whole.pairs[0]


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["data.row_tokens=128"], True),
        (["data.row_tokens=128", "rope.frequencies=fixed"], False),
        (["data.row_tokens=112", "rope.frequencies=fixed"], True),
        (["data.lengths=[128]", "rope.frequencies=fixed"], False),
        (["data.lengths=[64]", "rope.frequencies=fixed"], True),
    ],
)
def test_what_acts_at_all_distances_alike_needs_no_far_ones(tree, settings, warned):
    """Table and factors do; gains and phases alone, from rows of half the window, do not."""
    made = planned(tree, "rope.query_gains=pair", *settings)
    (note,) = (note for note in made.notes if "of the target window's distances are never trained" in note)
    assert note.startswith(f"{'WARNING: ' if warned else ''}{made.coverage.untrained:.0%} of")
    assert made.coverage.untrained >= 0.5


def test_the_documents_are_counted_and_what_was_skipped_is_told(tree, tmp_path):
    lines = [*Path(tree["data"]["train"][0]).read_text().splitlines(), '{"text": null}', '{"text": ""}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    settings = [f"data.train=[{tmp_path}/train.jsonl]", "data.skip_bad_rows=true"]
    found = planned(tree, *settings)
    text = found.text()
    # Documents of 700, 300, 90 and 40 words, and of 600 and 300, each with the end-of-text token.
    assert "documents data.train: 4 documents in 1 files, 1,134 tokens (mean 283, longest 701)" in text
    assert "documents data.heldout: 2 documents in 1 files, 902 tokens (mean 451, longest 601)" in text
    assert any("1 rows are skipped (data.skip_bad_rows)" in note and "line 5" in note for note in found.notes)
    assert "data.train: 1 documents are empty" in found.notes
    with pytest.raises(UserError, match="line 5: 'text' must be text; found null"):
        planned(tree, settings[0])


def test_a_plan_for_a_cached_hub_id_asks_no_server(tree, tmp_path, monkeypatch):
    """Without a network each question to the hub would wait for its time limit."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tree["base"]["model"], snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = planned(tree, "base.model=org/name")
    assert found.cost is not None
    assert found.rows is not None
    assert not asked
    assert not constants.HF_HUB_OFFLINE, "as it was before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bin", "has no weights in the safetensors format"),
        ("adapter", "makes this folder an adapter, not a base"),
        ("tokenizer", "has no tokenizer; copy the files of the model it was made from"),
        ("vocabulary", "the tokenizer gives token"),
    ],
)
def test_a_base_that_training_would_refuse_stops_a_plan(tree, tmp_path, change, message):
    base = tmp_path / "base"
    shutil.copytree(tree["base"]["model"], base)
    if change == "bin":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
    if change == "adapter":
        (base / "adapter_config.json").write_text("{}")
    if change == "tokenizer":
        for file in base.glob("tokenizer*"):
            file.unlink()
    if change == "vocabulary":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=message):
        planned(tree, f"base.model={base}")


def test_a_quantised_or_wrapped_base_is_a_note(tree, tmp_path):
    assert not [note for note in planned(tree).notes if note.startswith("base.model")]
    base = tmp_path / "base"
    shutil.copytree(tree["base"]["model"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    (note,) = BaseModel(Base(model=str(base))).notes()
    assert "the weights are quantised (gptq); nothing can be folded into them: tune the unquantised base" in note
    wrapped = AutoConfig.for_model("gemma3", text_config=tiny_config("gemma3_text").to_dict())
    wrapped.save_pretrained(base)
    (note,) = BaseModel(Base(model=str(base))).notes()
    assert "holds more than a language model (gemma3); only the language model is tuned" in note
