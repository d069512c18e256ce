"""The classic table of the field: method x factor x rise of perplexity, search-free, over one base model.

Every cell reads `factor` x native tokens of each held-out document (the `truncate` protocol) with the method at that
factor. The rise is against the native window slid over the same tokens, in percent of its perplexity.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..data import heldout_excerpts
from ..errors import UserError
from ..models import BaseModel
from ..recipe import Recipe
from ..runs import Run
from ..tunable import Start
from .comparison import methods
from .methods import NllCache
from .perplexity import NllSum, span_nats

SWEPT = ("linear", "ntk", "dynamic", "yarn")


@dataclass(frozen=True)
class Cell:
    """One method at one factor."""

    method: str
    factor: float
    length: int
    nll: float
    slid_nll: float
    """Of the slid native window, on the same tokens."""

    @property
    def rise(self) -> float:
        """Of perplexity, in percent."""
        return 100 * (math.exp(self.nll - self.slid_nll) - 1)


def check_factors(recipe: Recipe, factors: list[float]) -> None:
    """Refuse factors that `sweep` could not measure, before anything is.

    Raises:
        UserError: for factors that are no extension, or that no held-out document is long enough for.
    """
    wrong = [factor for factor in factors if not 1 <= factor < math.inf]
    if wrong:
        raise UserError(f"--factors: finite and at least 1, since less would shrink the window; found {wrong[0]:g}")
    if factors:
        longest = round(max(factors) * Start.of(BaseModel(recipe.base).facts, recipe.rope).native)
        heldout_excerpts(recipe.data, BaseModel(recipe.base), longest, 1)


def sweep(run: Run, factors: list[float]) -> list[Cell]:
    """Measure every search-free method at every factor that `check_factors` allows.

    Per-token nats are kept in the run folder.
    """
    recipe, cells = run.recipe, []
    begin = Start.of(run.base.facts, recipe.rope)
    cache = NllCache(recipe.base, run.folder / "nats", recipe.eval.chunk, run.base.prefix)
    stride = recipe.eval.stride or max(1, begin.native // 4)
    for factor in factors:
        length = round(factor * begin.native)
        documents = [ids for _, ids in heldout_excerpts(recipe.data, run.base, length, recipe.eval.documents)]
        slid = _mean([cache.slid(document, begin.native, stride)[0] for document in documents], length)
        hows = methods(replace(begin, factor=factor * begin.factor / begin.stretch, window=length), {})
        for method in SWEPT:
            how = hows[method]
            assert how is not None
            nats = [cache.tabled(how, document)[0] for document in documents]
            cells.append(Cell(method, factor, length, _mean(nats, length), slid))
    return cells


def _mean(nats: list[Tensor], length: int) -> float:
    return sum((span_nats(each, 1, length) for each in nats), NllSum(0.0, 0)).mean


def sweep_table(cells: list[Cell]) -> str:
    """Markdown: a row a method, a column a factor; perplexity and its rise."""
    factors = sorted({cell.factor for cell in cells})
    at = {(cell.method, cell.factor): cell for cell in cells}
    slid = {cell.factor: math.exp(cell.slid_nll) for cell in cells}
    titles = [f"factor {factor:g} ({at[SWEPT[0], factor].length} tokens)" for factor in factors]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(factors) + 1) + "|"]
    lines.append(f"| native window, slid | {' | '.join(f'{slid[factor]:.2f}' for factor in factors)} |")
    for method in SWEPT:
        row = [at[method, factor] for factor in factors]
        lines.append(f"| {method} | " + " | ".join(f"{math.exp(c.nll):.2f} ({c.rise:+.1f}%)" for c in row) + " |")
    return "\n".join(lines)
