"""The question in report.html: the answers are those of greedy decoding, and they are kept."""

import pytest
import torch
from tiny import recipe_tree, save_tiny
from transformers import AutoModelForCausalLM
from yarn_tune.data import Prompt
from yarn_tune.evaluation import greedy_answer
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.report.example import Example, example_html, example_of, example_or_note
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import tuned_row
from yarn_tune.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a small model, with needles of one length and two depths."""
    folder = tmp_path_factory.mktemp("run")
    tree = recipe_tree(save_tiny(folder / "base"), folder, steps=1)
    needles = ["eval.retrieval={wording: demo, lengths: [100, 200], depths: [0.25, 0.75], per_cell: 2}"]
    found = Run(parse_recipe(tree, needles), folder / "run")
    train(found)
    return found


@pytest.mark.parametrize("right", [0, 2, 4], ids=["no token of the draft is right", "two are", "all are"])
def test_answers_are_those_of_transformers_generate(run, right):
    """The right answer is the draft; it has no effect on the result."""
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, dtype=torch.float32).eval()
    ids = torch.randint(1, 120, (1, 60), generator=torch.Generator().manual_seed(right))
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )[0, 60:].tolist()
    draft = [token if place < right else (token + 1) % 120 for place, token in enumerate(expected)]
    assert greedy_answer(model, Prompt(ids[0].tolist(), draft, "", 0)) == expected


def test_the_example_is_a_prompt_of_the_measurement_and_is_kept(run, monkeypatch):
    made = example_of(run, tuned_row(run))
    assert (made.tokens, made.depth) == (200, 0.75)
    assert list(made.given) == ["none", "yarn", "tuned"]
    monkeypatch.setattr("yarn_tune.report.example.to_device", lambda model: pytest.fail("measured again"))
    assert example_of(run, tuned_row(run)) == made


def test_an_example_that_cannot_be_made_is_a_note(run, capsys, monkeypatch):
    """As where the held-out documents are not here any more."""
    monkeypatch.setitem(run.recipe.__dict__, "data", type(run.recipe.data)(train=[], heldout=["nowhere.txt"]))
    assert example_or_note(run, tuned_row(run)) is None
    assert "the report shows no question with its answers: data.heldout" in capsys.readouterr().err


def test_the_section_marks_the_number_and_says_what_is_right():
    example = Example("k", 2032, 0.5, "is 123 & more", "What is <it>?", "123", {"none": "<b>", "tuned": "123"})
    text = example_html(example)
    assert "is <b>123</b> &amp; more" in text
    assert "What is &lt;it&gt;?" in text
    assert "2,032 tokens" in text
    assert '<tr><td>base</td><td class="answer">&lt;b&gt;</td><td>wrong</td></tr>' in text
    assert '<tr><td>tuned</td><td class="answer">123</td><td>right</td></tr>' in text
