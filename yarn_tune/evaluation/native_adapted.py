"""The control of a comparison: the same kinds of numbers learned at the native window, without any extension.

What the control gains on held-out text is adaptation to that kind of text. Measured with its native window slid over
the document, it shows which part of a tuned model's gain is a longer reach.
"""

from dataclasses import replace

from ..errors import UserError
from ..recipe import YARN, Recipe
from ..runs import Run, TunedRow, tuned_row
from ..training import train
from ..tunable import Start, kinds_of

NAME = "native-adapted"
"""Name of the control's row, and of its folder inside the run folder."""


def has_control(recipe: Recipe) -> bool:
    """Whether a run has a control: `eval.native_adapted` is on, and more than frequencies is learned."""
    adapts = {kind.name for kind in kinds_of(recipe.rope, recipe.lora)} - {"frequency", "temperature"}
    return recipe.eval.native_adapted and bool(adapts)


def native_adapted_run(run: Run) -> Run | None:
    """The control's run; None where there is none (`has_control`).

    It reads the same rows in the same steps, cut to the native window, so that it learns from as many tokens. Its rows
    have no planted questions, since the cuts would separate most questions from their needles. Its objective is the
    next token alone: comparing with the base would hold back the adaptation that it measures.

    Raises:
        UserError: if the rows cannot be cut into native windows.
    """
    recipe = run.recipe
    if not has_control(recipe):
        return None
    start = Start.of(run.base.facts, recipe.rope)
    tokens = recipe.row_tokens()
    if tokens > start.native and tokens % start.native:
        raise UserError(
            f"eval.native_adapted: rows of {tokens} tokens (data.row_tokens) cannot be cut into native windows of "
            f"{start.native}; choose a multiple of it, or switch eval.native_adapted off"
        )
    least = start.facts.ramp.factor if start.facts.ramp else 1.0
    control = replace(
        recipe,
        name=NAME,
        rope=replace(recipe.rope, frequencies="fixed", factor=least, init=YARN),
        data=replace(
            recipe.data, needles=0.0, lengths=[start.native] if tokens > start.native else recipe.data.lengths
        ),
        train=replace(recipe.train, objective="next-token", short_context_kl=0.0),
    )
    return Run(control, run.folder / NAME)


def learn_native_adapted(run: Run) -> TunedRow | None:
    """Train the control, or continue it, or read what it has learned; None as for `native_adapted_run`.

    Raises:
        UserError, CheckFailed, Interrupted: as `train`.
    """
    control = native_adapted_run(run)
    if control is None:
        return None
    if not control.numbers_path.is_file():
        train(control)
    return tuned_row(control)
