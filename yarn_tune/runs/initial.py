"""Learned offsets to start from (`rope.init`): of a finished run, of a checkpoint, or of an adapter.

Rows, objective, learning rates and even the window may differ from the earlier run's. The offsets from search-free YaRN
are loaded, the optimizer's state is not; under another window they are offsets from the YaRN of that window. Offsets
from another search-free method are converted to offsets from YaRN. The earlier folder is needed only until the first
checkpoint.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapter import AdapterSections, adapter_numbers, is_adapter, read_sections
from ..errors import UserError
from ..files import Tensors, read_tensors, write_checked
from ..models import BaseModel, base_identity
from ..recipe import METHODS, YARN, Recipe, load_recipe
from ..tunable import at_start
from .checkpoint import LEARNED, read_state
from .metrics import EARLIER, spent


@dataclass(frozen=True)
class PreviousRun:
    """The learned offsets to start from, and what they cost."""

    folder: Path
    numbers: Tensors
    """Offsets by the names that `TunableRotary.load_numbers` accepts."""
    steps: int
    """Steps, tokens and seconds are 0 for an adapter, which does not record them."""
    tokens: int
    seconds: float

    def note(self, folder: Path) -> None:
        """Write into a run folder what was spent before it, for `metrics.spent`."""
        costs = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        write_checked(folder / EARLIER, {"learned_in": str(self.folder), **costs})


def previous_run(recipe: Recipe) -> PreviousRun | None:
    """The finished run, the checkpoint or the adapter that `rope.init` names; None for a search-free method.

    Raises:
        UserError: if nothing was learned there, or it was learned on another base, or the kinds of parameters differ.
    """
    if recipe.rope.init in METHODS:
        return None
    folder = Path(recipe.rope.init)
    if (folder / LEARNED).is_file():
        before = load_recipe(folder / "recipe.yaml")
        _check_fit(folder, before, recipe)
        return PreviousRun(folder, _from_yarn(folder, before, read_tensors(folder / LEARNED)), *spent(folder))
    if (state := read_state(folder)) is not None:
        run = folder.absolute().parents[1]
        before = load_recipe(run / "recipe.yaml")
        _check_fit(folder, before, recipe)
        return PreviousRun(folder, _from_yarn(folder, before, state.numbers), *spent(run, state.step))
    if is_adapter(folder):
        sections = read_sections(folder)
        _check_fit(folder, sections, recipe)
        rotary = at_start(BaseModel(sections.base), sections.rope)
        return PreviousRun(folder, _from_yarn(folder, sections, adapter_numbers(folder, rotary)), 0, 0, 0.0)
    raise UserError(
        f"rope.init: {folder} is no finished run (with {LEARNED}), no checkpoint of one (checkpoints/step-...) and no "
        f"adapter of yarn_tune; train that one to the end first, or set it to one of {', '.join(METHODS)}"
    )


def _from_yarn(folder: Path, before: Recipe | AdapterSections, numbers: Tensors) -> Tensors:
    """Offsets from the method that the earlier run started from, as offsets from search-free YaRN.

    Raises:
        UserError: if the frequencies of that method were kept, so that no offsets from YaRN were learned.
    """
    if before.rope.method == YARN:
        return numbers
    start = at_start(BaseModel(before.base), before.rope).start
    if before.rope.frequencies == "fixed":
        raise UserError(
            f"rope.init: {folder} kept the frequencies of {METHODS[start.method]} (rope.frequencies: fixed), which a "
            "run that starts from YaRN cannot; train it with more steps instead"
        )
    yarn = replace(start, method=YARN)
    moved = dict(numbers)
    if "offsets.log_factor" in numbers:
        moved["offsets.log_factor"] = numbers["offsets.log_factor"] + (yarn.inv_freq() / start.inv_freq()).log()
    ratio = yarn.attention_factor / start.attention_factor
    moved["log_temperature"] = numbers["log_temperature"] + 2 * math.log(ratio)
    return moved


def _check_fit(folder: Path, before: Recipe | AdapterSections, now: Recipe) -> None:
    """Refuse offsets that were learned with another base, other kinds of parameters or other LoRA targets."""
    found, wanted = (
        {
            "base.model, base.revision": base_identity(each.base),
            "rope.frequencies": each.rope.frequencies,
            "rope.query_gains": each.rope.query_gains,
            "rope.qk_bias": each.rope.qk_bias,
            "lora": each.lora and (each.lora.rank, sorted(each.lora.targets)),
        }
        for each in (before, now)
    )
    if changed := [f"{key}: {found[key]} there, {wanted[key]} here" for key in wanted if found[key] != wanted[key]]:
        raise UserError(f"rope.init: what was learned in {folder} does not fit this recipe:\n  " + "\n  ".join(changed))
