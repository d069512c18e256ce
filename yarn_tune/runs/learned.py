"""The learned numbers of a finished run: written at its end, and read back for comparison and export."""

from dataclasses import dataclass, replace

from safetensors.torch import save

from ..adapter import adapter_numbers, adapter_recipe, is_adapter, write_adapter
from ..errors import UserError
from ..files import read_tensors, write_atomically, write_json
from ..serving import Target, representable_parameters
from ..tunable import Learned, TunableRotary, at_start
from .folder import Run, changes
from .metrics import spent

MEANING = ("rope", "lora")
"""Sections that say what the learned numbers are offsets from."""


def learned_of(run: Run) -> Learned:
    """What a finished run (or an adapter in its place) learned, settled into numbers a config can carry.

    Raises:
        UserError: if the run is not finished, or the numbers are damaged, another base's or another recipe's.
    """
    recipe = run.recipe
    rotary = at_start(run.base, recipe.rope)
    own = adapter_recipe(run.folder, []) if is_adapter(run.folder) else None
    changed = changes(run, MEANING, begins=False)
    if own is not None and own.rope != replace(recipe.rope, init=own.rope.init):
        changed = ["rope"]
    if changed:
        raise UserError(
            f"{run.folder}: its numbers were learned under other settings, and mean something else under these; leave "
            "them as they were, or learn anew under another name=:\n  " + "\n  ".join(changed)
        )
    if run.numbers_path.is_file():
        rotary.load_numbers(read_tensors(run.numbers_path))
    elif own is not None:
        rotary.load_numbers(adapter_numbers(run.folder, rotary))
    else:
        raise UserError(f"{run.folder}: nothing learned here yet; run `yarn-tune train` to the end first")
    return representable_parameters(rotary, Target.of_model(run.base, recipe.export))


def write_learned(run: Run, rotary: TunableRotary, learned: Learned, place: str) -> None:
    """What a run leaves when it is done: its numbers, the adapter for the rotary module at `place`, and a summary."""
    write_atomically(run.numbers_path, save(rotary.numbers()))
    write_adapter(run.folder / "adapter", run.recipe, rotary, place)
    write_json(
        run.folder / "learned.json",
        {"frequencies": learned.frequencies, "numbers": rotary.count(), **learned.summary()},
    )


@dataclass(frozen=True)
class TunedRow:
    """Learned numbers, and what they cost."""

    learned: Learned
    tokens: int
    """Read to obtain them."""
    seconds: float


def tuned_row(run: Run) -> TunedRow:
    """A finished run's settled numbers and what they cost.

    Raises:
        UserError: if the run is not finished.
    """
    learned = learned_of(run)
    _, tokens, seconds = spent(run.folder)
    return TunedRow(learned, tokens, seconds)
