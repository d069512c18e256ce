"""The table of serving stacks: one row holds every fact about a stack."""

from typing import get_args

from tiny import recipe_tree, save_tiny
from yarn_tune.export.checkpoint import export
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.results_schema import StackName
from yarn_tune.runs.folder import Run
from yarn_tune.serving.readers import Stack
from yarn_tune.serving.rules import v5_sections
from yarn_tune.serving.stacks import STACKS
from yarn_tune.serving.tables import Yarn, own_multiplier
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train


def test_the_recipe_names_the_stacks():
    assert get_args(StackName) == tuple(STACKS)


def test_every_row_is_complete():
    for name, stack in STACKS.items():
        assert name == stack.name
        assert stack.source.startswith("https://")
        assert stack.evidence.startswith(("run", "source"))
        assert stack.command(4096), f"{name} has no serve command"
        assert "WINDOW" not in stack.command(4096)


def test_a_new_stack_is_one_row(tmp_path, monkeypatch):
    """A stack that reads no attention factor, added at run time: training, export and verification obey it."""
    stack = Stack(
        "made-up", "1.0", "https://example.org", "source", v5_sections, Yarn(own_multiplier),
        "it does not know longrope", default=True,
    )  # fmt: skip
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path, steps=2), ["rope.frequencies=scale", "rope.query_gains=none"])
    carried = export_of(Run(recipe, tmp_path / "before"))
    monkeypatch.setitem(STACKS, "made-up", stack)
    target = export_of(Run(recipe, tmp_path / "run"))
    assert "Folded" not in (carried / "SERVING.md").read_text()
    page = (target / "SERVING.md").read_text()
    assert "| made-up (1.0) | no command is known |" in page
    assert "- Folded: " in page
    made = verify(str(target))
    assert made.passed
    assert "made-up" in {line.stack for line in made.lines}
    (line,) = verify(str(carried), ["made-up"]).lines
    assert line.status == "differs"
    assert "multiplies cos and sin by" in line.problems[0]


def export_of(run: Run):
    train(run)
    return export(run)
