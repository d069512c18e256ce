"""The end of a run with `train.decide`: nothing worse than search-free YaRN is kept."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny, write_documents
from yarn_tune.cli.main import main
from yarn_tune.data.rows import RowRequest, build_rows_apart
from yarn_tune.distributed import Request
from yarn_tune.errors import Interrupted, UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.recipe.loading import RecipeError, parse_recipe
from yarn_tune.runs.checkpoint import checkpoints
from yarn_tune.runs.decision import Candidate, Decision, read_decision
from yarn_tune.runs.folder import Run
from yarn_tune.training import decision as deciding
from yarn_tune.training.decision import TailAverage, plan_of, scaled
from yarn_tune.training.loop import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_run(base, tmp_path):
    def make(name="run", *overrides, **settings):
        tree = recipe_tree(base, tmp_path, **{"decide": True, **settings})
        tree["data"]["train"] = [str(write_documents(tmp_path / "many.jsonl", [600] * 40))]
        return Run(parse_recipe(tree, list(overrides)), tmp_path / name)

    return make


def decision(gains: dict[float, list[float]]) -> Decision:
    """Candidates of the final numbers by factor, each better than YaRN by so much on each row."""
    rows = len(next(iter(gains.values())))
    made = [Candidate("final", factor, [5.0 - g for g in own], 5.0) for factor, own in gains.items()]
    return Decision([*made, Candidate("final", 0.0, [5.0] * rows, 5.0)], rows, 256)


def test_the_lowest_loss_that_is_better_on_enough_rows_is_kept():
    steady, lucky = [0.1] * 16, [9.0] * 9 + [-0.1] * 7
    assert decision({1.0: steady, 0.5: [0.05] * 16}).chosen.factor == 1.0
    assert decision({1.0: lucky, 0.5: steady}).chosen.factor == 0.5  # a lower mean, on 9 of 16 rows
    assert decision({1.0: lucky}).keeps_start
    assert decision({1.0: [math.nan] * 16}).keeps_start
    # Better on all rows but one, which outweighs them.
    assert decision({1.0: [0.1] * 15 + [-9.0]}).keeps_start


@pytest.mark.parametrize("rows", [1, 5, 7, 8, 12, 16, 40])
def test_enough_rows_are_those_of_a_sign_test(rows):
    made = decision({factor: [0.1] * rows for factor in range(1, 9)})
    chances = np.ones(1)  # of each count of heads among so many coins
    for _ in range(rows):
        chances = np.convolve(chances, [0.5, 0.5])
    assert chances[made.needed :].sum() <= 0.05 / 8 or made.needed == rows
    assert chances[made.needed - 1 :].sum() > 0.05 / 8
    assert made.chosen.factor == 1
    assert not made.keeps_start


def test_offsets_are_scaled_and_of_lora_the_factor_that_is_zero_at_the_start():
    numbers = {"log_temperature": torch.tensor([0.4]), "lora.q.A": torch.ones(2), "lora.q.B": torch.ones(2)}
    half, none = scaled(numbers, 0.5), scaled(numbers, 0.0)
    assert [t.tolist() for t in half.values()] == [[pytest.approx(0.2)], [1, 1], [0.5, 0.5]]
    assert [t.tolist() for t in none.values()] == [[0], [1, 1], [0, 0]]


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_the_average_is_that_of_the_last_half(steps):
    average, values = TailAverage(steps), torch.arange(1.0, steps + 1)
    for step, value in enumerate(values):
        average.add(step, {"x": value[None]})
    assert average.mean(steps)["x"].item() == pytest.approx(values[steps // 2 :].mean().item())


def test_documents_of_random_tokens_lead_to_offsets_of_zero(make_run, capsys):
    run = make_run("run", "rope.query_gains=pair_phase", steps=6, learning_rate=0.03)
    train(run)
    assert all(bool((value == 0).all()) for value in load_file(run.numbers_path).values())
    made = read_decision(run)
    assert made.keeps_start
    assert (made.rows, len(made.candidates)) == (16, len(plan_of([2, 4])))
    said = json.loads((run.folder / "decision.json").read_text())
    assert [each["kept"] for each in said["candidates"]] == [False] * 10 + [True]
    assert [each["iterate"] for each in said["candidates"][8:]] == ["step 2", "step 4", "final"]
    # The candidates are other states than YaRN: their losses differ on every row.
    assert all(own != yarn for own, yarn in zip(made.candidates[0].losses, made.start.losses, strict=True))
    with pytest.raises(UserError, match="so an export would serve search-free YaRN; .* or pass --anyway"):
        export(run)
    assert not (run.folder / "export").exists()
    assert main(["export", str(run.folder)]) == 2
    assert main(["export", str(run.folder), "--anyway"]) == 0
    assert main(["train", str(run.folder)]) == 0
    assert "no candidate is better than search-free YaRN on 14 rows or more" in capsys.readouterr().out


def test_what_helps_everywhere_is_kept(make_run, base, tmp_path):
    """Training on rows that repeat a few words teaches them, and validation documents of the same words show it."""
    texts = [" ".join(f"w{(i * i + n) % 5}" for i in range(600)) for n in range(40)]
    path = tmp_path / "repeated.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = ["rope.query_gains=pair_phase", f"data.train=[{path}]"]
    run = make_run("run", *settings, steps=30, learning_rate=0.03)
    train(run)
    made = read_decision(run)
    assert not made.keeps_start
    assert made.chosen.loss == min(candidate.loss for candidate in made.candidates)
    assert made.better(made.chosen) >= made.needed == 14
    plain = make_run("plain", *settings, steps=30, learning_rate=0.03, decide=False)
    train(plain)
    assert not (plain.folder / "decision.json").exists()
    kept = load_file(run.numbers_path)
    assert any(bool(value.any()) for value in kept.values())
    export(run)


def test_a_decision_that_was_killed_is_made_again(make_run, monkeypatch):
    whole = make_run("whole", steps=4)
    train(whole)
    measure, calls = deciding._row_losses, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(deciding, "_row_losses", dying)
    killed = make_run("killed", steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    assert not killed.numbers_path.exists()
    # The second half of the average comes from the checkpoint after step 3.
    train(killed)
    for name in ("decision.json", "learned.safetensors"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_the_average_is_resumed_from_a_checkpoint(make_run, monkeypatch):
    whole = make_run("whole", steps=6, checkpoint_every=1)
    train(whole)
    step, calls = torch.optim.AdamW.step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    killed = make_run("killed", steps=6, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    train(killed)
    assert len(calls) == 7  # five steps before, and the sixth twice
    for name in ("decision.json", "learned.safetensors"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_validation_rows_come_from_documents_that_are_not_trained_on(make_run):
    run = make_run()
    rows, validation = build_rows_apart(run.recipe.data, run.base, RowRequest(256, 60, 0), 16)
    assert (len(rows.rows), len(validation.rows)) == (60, 16)
    of_training = {tuple(row.input_ids[1:60].tolist()) for row in rows.rows}
    assert not of_training & {tuple(row.input_ids[1:60].tolist()) for row in validation.rows}
    assert rows.packed.tokens + validation.packed.tokens == 40 * 601
    assert validation.packed.documents == 7  # of 601 tokens each: the fewest that hold 16 rows


def test_named_validation_documents_are_used(make_run, tmp_path):
    named = write_documents(tmp_path / "validation.jsonl", [300], seed=900)
    run = make_run("run", f"data.validation=[{named}]")
    rows, validation = build_rows_apart(run.recipe.data, run.base, RowRequest(256, 60, 0), 16)
    assert (rows.packed.documents, validation.packed.documents, len(validation.rows)) == (40, 1, 1)


def test_validation_documents_that_cannot_be(make_run, tmp_path):
    one = write_documents(tmp_path / "one.jsonl", [900])
    with pytest.raises(UserError, match="data.validation: data.train holds one document only, so none can be held"):
        train(make_run("run", f"data.train=[{one}]"))
    short = write_documents(tmp_path / "short.jsonl", [90], seed=900)
    with pytest.raises(UserError, match="data.validation: 91 tokens in 1 documents do not fill one row of 256"):
        train(make_run("run", f"data.validation=[{short}]"))
    with pytest.raises(RecipeError, match="data.validation: a document of data.train"):
        make_run("run", f"data.validation=[{tmp_path / 'many.jsonl'}]")
    with pytest.raises(RecipeError, match="data.validation: only train.decide reads validation documents"):
        make_run("run", f"data.validation=[{short}]", decide=False)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "many.jsonl").read_bytes())
    with pytest.raises(UserError, match="data.validation: .* is among the files of data.train too"):
        train(make_run("run", f"data.validation=[{copy}]"))


def test_validation_documents_among_the_training_ones_are_found_by_their_content(make_run, tmp_path):
    """Some lines of the training file, between others; a short text that repeats is no reason."""
    make_run("plain")  # writes the training documents
    lines = (tmp_path / "many.jsonl").read_text().splitlines()
    own = write_documents(tmp_path / "own.jsonl", [300, 20], seed=900).read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([own[0], lines[3], lines[7]]) + "\n")
    with pytest.raises(UserError, match="data.validation: 2 of 3 documents are documents of data.train too"):
        train(make_run("run", f"data.validation=[{mixed}]", "data.rows=200"))  # all documents are read
    mixed.write_text("\n".join(own) + "\n")
    run = make_run("run", f"data.validation=[{mixed}]")
    with (tmp_path / "many.jsonl").open("a") as file:
        file.write(own[1] + "\n")
    assert build_rows_apart(run.recipe.data, run.base, RowRequest(256, 60, 0), 16)[1].packed.documents == 2


def test_validation_and_heldout_files_are_compared_by_content(make_run, tmp_path):
    run = make_run("run")
    held = Path(run.recipe.data.heldout[0])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(held.read_bytes())
    with pytest.raises(UserError, match=rf"data.validation: {copy} is among the files of data.heldout too, as {held}"):
        train(make_run("run", f"data.validation=[{copy}]"))


def test_an_earlier_checkpoint_is_kept_where_it_is_the_best(make_run, monkeypatch):
    """The loss of the validation rows is replaced by the distance of the numbers from those after step 2."""
    seen = {}

    def distance(objective, rows, world, release):
        now = objective.rotary.numbers()["log_temperature"]
        away = (now - seen["step 2"]).abs().item()
        return torch.full((len(rows), 2), 1 + away) - torch.arange(len(rows))[:, None] * 1e-9

    run = make_run("run", steps=6)
    before = make_run("before", steps=6)
    train(before)
    seen["step 2"] = load_file(before.checkpoints / "step-000002" / "state.safetensors")["numbers.log_temperature"]
    monkeypatch.setattr(deciding, "_row_losses", distance)
    train(run)
    assert read_decision(run).chosen.iterate == "step 2"
    assert torch.equal(load_file(run.numbers_path)["log_temperature"], seen["step 2"])


def test_a_run_that_a_signal_stopped_compares_the_same_states(make_run, monkeypatch):
    """The checkpoint of the signal, after step 5, is no candidate, and no older one is deleted for it."""
    settings = {"steps": 8, "checkpoint_every": 2, "keep_checkpoints": 3}
    whole = make_run("whole", **settings)
    train(whole)
    agreed, calls = Request.agreed, []

    def stopping(self, accelerator):
        calls.append(1)
        return signal.SIGTERM if len(calls) == 5 else agreed(self, accelerator)

    monkeypatch.setattr(Request, "agreed", stopping)
    stopped = make_run("stopped", **settings)
    with pytest.raises(Interrupted):
        train(stopped)
    assert [path.name for path in checkpoints(stopped.checkpoints)] == ["step-000002", "step-000004", "step-000005"]
    train(stopped)
    assert [each.iterate for each in read_decision(stopped).candidates[8:10]] == ["step 4", "step 6"]
    for name in ("decision.json", "learned.safetensors"):
        assert (stopped.folder / name).read_bytes() == (whole.folder / name).read_bytes()
