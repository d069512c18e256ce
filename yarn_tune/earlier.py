"""An earlier run to learn on from (`rope.init`): rows, objective, rates, even the window may be others now.

What is taken over are the offsets from search-free YaRN, not the optimizer's state. Where the window is another, they
are laid over the YaRN of the new one. The run that takes them over needs the earlier one's folder only to begin.
"""

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import LEARNED, Tensors, read_tensors, write_json
from .errors import UserError
from .metrics import EARLIER, spent
from .recipe import load_recipe
from .sections import YARN, Recipe


@dataclass(frozen=True)
class Earlier:
    """What was learned before, and what it cost."""

    folder: Path
    numbers: Tensors
    """Offsets by the names `TunableRotary.load_numbers` takes."""
    steps: int
    tokens: int
    seconds: float

    def note(self, folder: Path) -> None:
        """Leave in a run folder what was spent before it, for `metrics.spent`."""
        costs = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        write_json(folder / EARLIER, {"run": str(self.folder), **costs})


def earlier_of(recipe: Recipe) -> Earlier | None:
    """The finished run that `rope.init` names; None for search-free YaRN.

    Raises:
        UserError: if nothing was learned there, or for another base, or other kinds of numbers.
    """
    if recipe.rope.init == YARN:
        return None
    folder = Path(recipe.rope.init)
    if not (folder / LEARNED).is_file():
        raise UserError(
            f"rope.init: {folder} holds no finished run (no {LEARNED}); train that one first, or set it to {YARN}"
        )
    before, now = _fitting(load_recipe(folder / "recipe.yaml")), _fitting(recipe)
    if changed := [f"{key}: {before[key]} there, {now[key]} here" for key in now if before[key] != now[key]]:
        raise UserError(f"rope.init: what {folder} learned does not fit this recipe:\n  " + "\n  ".join(changed))
    return Earlier(folder, read_tensors(folder / LEARNED), *spent(folder))


def _fitting(recipe: Recipe) -> dict[str, object]:
    """What two runs must share for the numbers of one to be a start of the other."""
    return {
        "base.model": recipe.base.model,
        "base.revision": recipe.base.revision,
        "rope.learn": recipe.rope.learn,
        "rope.temperature": recipe.rope.temperature,
        "lora": recipe.lora,
    }
