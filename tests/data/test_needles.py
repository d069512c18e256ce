"""Questions planted in training rows, and rows cut to shorter ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NATIVE, as_lists, recipe_tree, rows_of, save_tiny
from yarn_tune.data.needles import plant_needles
from yarn_tune.errors import UserError
from yarn_tune.models.base import BaseModel
from yarn_tune.models.token_loss import IGNORED
from yarn_tune.recipe.loading import RecipeError, parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.training.batches import Batch, collate
from yarn_tune.training.loop import train

DEMO = "data/tiny-base"


@pytest.fixture
def demo(monkeypatch):
    """The demo's recipe on its real documents and tokenizer, with short rows."""
    monkeypatch.chdir(Path(__file__).parents[2])

    def make(*settings):
        tree = {
            "name": "demo",
            "base": {"model": DEMO, "dtype": "float32"},
            "rope": {"window": 1024},
            "data": {
                "train": ["data/sample/train.jsonl.gz"],
                "heldout": ["data/sample/heldout.jsonl.gz"],
                "wording": "demo",
            },
            "train": {"steps": 5, "batch_size": 4},
        }
        return parse_recipe(tree, list(settings))

    return make


def test_planted_rows_ask_for_what_they_state(demo):
    recipe = demo("data.needles=0.3")
    base = BaseModel(recipe.base)
    tokenizer = base.tokenizer
    plain = rows_of(recipe, base)
    planted = plant_needles(plain, recipe.data, base, 0)
    assert as_lists(plant_needles(plain, recipe.data, base, 0).rows) == as_lists(planted.rows)
    asking = [row for row in planted.rows if row.answers]
    assert len(asking) == 6
    assert sum(a == b for a, b in zip(as_lists(plain.rows), as_lists(planted.rows), strict=True)) == 14
    for row in asking:
        assert len(row.input_ids) == 1024
        assert row.position_ids.tolist() == list(range(1024))
        assert row.labels.tolist() == [*row.input_ids.tolist()[1:], IGNORED]
        answer = tokenizer.decode(row.labels[-row.answers - 1 : -1]).strip()
        assert answer.isdigit()
        assert len(answer) == 5
        text = tokenizer.decode(row.input_ids)
        assert text.count(answer) == 2
        assert text.endswith(f" is {answer}")


def test_planted_tasks_take_turns(demo):
    recipe = demo("data.needles=0.5", "data.needle_tasks=[words, needle, variables]")
    base = BaseModel(recipe.base)
    planted = plant_needles(rows_of(recipe, base), recipe.data, base, 0)
    asking = [row for row in planted.rows if row.answers]
    marks = ("ring most often?", "What is the number of", "Which variables have the value")
    texts = [base.tokenizer.decode(row.input_ids) for row in asking]
    assert len(texts) == 10
    for number, text in enumerate(texts):
        assert [mark in text for mark in marks] == [place == number % 3 for place in range(3)]
    for row, text in zip(asking, texts, strict=True):
        assert len(row.input_ids) == 1024
        assert text.endswith(base.tokenizer.decode(row.labels[-row.answers - 1 : -1]))


def test_rows_with_several_needles_ask_for_one(demo):
    """As many different numbers as keys, of which the answer is the one for the word in the question."""
    recipe = demo("data.needles=1.0", "data.needle_keys=3")
    base = BaseModel(recipe.base)
    for row in plant_needles(rows_of(recipe, base), recipe.data, base, 0).rows:
        text = base.tokenizer.decode(row.input_ids)
        *stated, asked = re.findall(r"The number of the (\w+) is (\d{5})", text)
        assert len(row.input_ids) == 1024
        assert len(dict(stated)) == 3
        assert asked in stated
        assert text.count("What is the number of") == 1
        assert base.tokenizer.decode(row.labels[-row.answers - 1 : -1]).strip() == asked[1]
    recipe = demo("data.needles=1.0", "data.needle_keys=20")
    with pytest.raises(UserError, match="^data.needle_keys: at most 14 with this wording; found 20"):
        plant_needles(rows_of(recipe, base), recipe.data, base, 0)


def test_marks_are_on_the_answer(demo):
    recipe = demo("data.needles=1.0")
    base = BaseModel(recipe.base)
    tokenizer = base.tokenizer
    rows = plant_needles(rows_of(recipe, base), recipe.data, base, 0).rows[:2]
    batch = collate(rows, torch.device("cpu"))
    for row, marks, labels in zip(rows, batch["answers"], batch["labels"], strict=True):
        assert tokenizer.decode(labels[marks]).strip() == tokenizer.decode(row.input_ids)[-5:]
    # Cut short, the needle may be elsewhere: the answer does not count.
    (*_, last) = rows[0].pieces(256)
    assert last.answers == 0
    assert last.labels[-rows[0].answers - 1 :].tolist() == [IGNORED] * (rows[0].answers + 1)


def test_rows_too_short_for_a_question(demo):
    recipe = demo("data.needles=1.0", "data.row_tokens=16")
    base = BaseModel(recipe.base)
    with pytest.raises(UserError, match="^data.needles: retrieval length: .* tokens hold no prompt"):
        plant_needles(rows_of(recipe, base), recipe.data, base, 0)


def test_no_document_ends_in_the_prose_of_a_question(demo):
    recipe = demo("data.needles=1.0", "data.row_tokens=256", "train.steps=500")
    base = BaseModel(recipe.base)
    tokenizer = base.tokenizer
    plain = rows_of(recipe, base)
    shared = [row for row in plain.rows if tokenizer.eos_token_id in row.input_ids]
    assert shared
    for row in plant_needles(replace(plain, rows=shared), recipe.data, base, 0).rows:
        assert len(row.input_ids) == 256
        assert row.answers
        assert tokenizer.eos_token_id not in row.input_ids


@pytest.mark.parametrize(("order", "read"), [("mixed", [64, 256, 64, 256]), ("staged", [64, 64, 256, 256])])
def test_lengths_take_turns_or_follow_each_other(tmp_path, order, read):
    base = save_tiny(tmp_path / "base")
    settings = ["data.lengths=[64,256]", f"data.order={order}", "train.steps=4"]
    recipe = parse_recipe(recipe_tree(base, tmp_path), settings)
    rows = rows_of(recipe, BaseModel(recipe.base))
    found = []
    for step in range(4):
        batch = Batch.of(recipe, rows, step)
        lengths = {len(row.input_ids) for row in batch.rows}
        assert len(lengths) == 1
        assert sum(len(row.input_ids) for row in batch.rows) == 2 * 256, "the same tokens every step"
        assert batch.micro_batch_size * lengths.copy().pop() == 256, "and the same memory"
        assert all(row.position_ids[0] == 0 for row in batch.rows)
        found += lengths
    assert found == read


def test_a_piece_predicts_the_first_token_of_the_next(tmp_path):
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path), [])
    (row, *_) = rows_of(recipe, BaseModel(recipe.base)).rows
    pieces = row.pieces(64)
    assert [label for piece in pieces for label in piece.labels] == row.labels.tolist()
    assert [token for piece in pieces for token in piece.input_ids] == row.input_ids.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        ("train.objective=distill", "train.short_context_kl=0.5"),
        ("train.short_context_kl=1.0", "rope.query_gains=pair_phase"),
        ("train.short_context_kl=1.0", "rope.query_gains=pair", f"data.lengths=[{NATIVE},256]"),
    ],
    ids=lambda s: " ".join(s),
)
def test_every_way_of_learning_moves_every_number_and_resumes(tmp_path, settings):
    """Two steps, interrupted after the first and continued, end with the same numbers as two in one go."""
    base = save_tiny(tmp_path / "base")
    tree = recipe_tree(base, tmp_path, steps=2, checkpoint_every=1, gradient_checkpointing=False, warmup=0.0)
    recipe = parse_recipe(tree, list(settings))
    once = Run(recipe, tmp_path / "once")
    train(once)
    saved = once.numbers_path.read_bytes()
    learned = once.recipe.rope
    assert learned == recipe.rope
    again = Run(recipe, tmp_path / "again")
    train(again)
    for leftover in ("learned.safetensors", "checkpoints/step-000002/state.json"):
        (again.folder / leftover).unlink()
    train(again)
    assert again.numbers_path.read_bytes() == saved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.lengths=[100]",), "data.lengths: every length must divide the tokens of a row"),
        (("data.lengths=[]",), "data.lengths"),
        (("data.needles=1.5",), "data.needles: must be at least 0 and at most 1"),
        (
            ("data.needles=0.5", "data.packing=concat"),
            "data.needles: questions are planted only in rows that documents do not share",
        ),
        (("train.short_context_kl=-1",), "train.short_context_kl: must be at least 0"),
        (
            ("train.objective=distill", "data.packing=concat"),
            "data.packing: .* compares with the base, which reads only rows",
        ),
    ],
)
def test_impossible_combinations(tmp_path, settings, message):
    tree = recipe_tree(tmp_path / "base", tmp_path)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tree, list(settings))
