"""Measure search-free methods at several factors: the rise of perplexity per method and factor, without tuning.

Every cell reads `factor` x native tokens of each held-out document in one pass, with the method at that factor. The
rise is against the base with its native window slid over the same tokens, in percent of that perplexity.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..data import heldout_excerpts
from ..errors import UserError
from ..runs import Run
from ..tunable import Start
from .methods import search_free_methods, servable
from .nll_cache import NllCache
from .perplexity import NllSum, span_nll

SWEPT = ("linear", "ntk", "dynamic", "yarn")


@dataclass(frozen=True)
class SweepCell:
    """One method at one factor."""

    method: str
    factor: float
    length: int
    """Tokens of each excerpt."""
    nll: float
    slid_nll: float
    """NLL of the slid native window on the same tokens."""

    @property
    def rise(self) -> float:
        """Rise of perplexity over the slid native window, in percent."""
        return 100 * (math.exp(self.nll - self.slid_nll) - 1)


def check_factors(run: Run, factors: list[float]) -> None:
    """Refuse factors that `sweep` cannot measure, before anything is measured.

    Raises:
        UserError: if a factor would shrink the window, or no held-out document is long enough for it.
    """
    wrong = [factor for factor in factors if not 1 <= factor < math.inf]
    if wrong:
        raise UserError(f"--factors: finite and at least 1, since less would shrink the window; found {wrong[0]:g}")
    if factors:
        longest = round(max(factors) * Start.of(run.base.facts, run.recipe.rope).native)
        heldout_excerpts(run.recipe.data, run.base, longest, 1)


def sweep(run: Run, factors: list[float]) -> list[SweepCell]:
    """Measure every search-free method at every factor that `check_factors` allows.

    The NLL of every token is kept in the run folder.
    """
    recipe, cells = run.recipe, []
    begin = Start.of(run.base.facts, recipe.rope)
    cache = NllCache(run.base, run.folder / "nll", recipe.eval.chunk)
    stride = recipe.eval.stride_over(begin.native)
    for factor in factors:
        length = round(factor * begin.native)
        excerpts = heldout_excerpts(recipe.data, run.base, length, recipe.eval.documents)
        documents = [ids for _, ids in excerpts]
        slid = _mean([cache.slid(document, begin.native, stride)[0] for document in documents], length)
        at = replace(begin, factor=factor * begin.factor / begin.stretch, window=length)
        methods = search_free_methods(at, SWEPT)
        for name in servable(SWEPT, begin.facts.theta_only):
            nll = [cache.full(methods[name], document, shared=True)[0] for document in documents]
            cells.append(SweepCell(name, factor, length, _mean(nll, length), slid))
    return cells


def _mean(nll: list[Tensor], length: int) -> float:
    return sum((span_nll(each, 1, length) for each in nll), NllSum(0.0, 0)).mean


def sweep_table(cells: list[SweepCell]) -> str:
    """A Markdown table of perplexity and its rise: one row per method, one column per factor."""
    factors = sorted({cell.factor for cell in cells})
    at = {(cell.method, cell.factor): cell for cell in cells}
    slid = {cell.factor: math.exp(cell.slid_nll) for cell in cells}
    methods = [name for name in SWEPT if any(cell.method == name for cell in cells)]
    titles = [f"factor {factor:g} ({at[methods[0], factor].length} tokens)" for factor in factors]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(factors) + 1) + "|"]
    lines.append(f"| native window, slid | {' | '.join(f'{slid[factor]:.2f}' for factor in factors)} |")
    for method in methods:
        row = [at[method, factor] for factor in factors]
        lines.append(f"| {method} | " + " | ".join(f"{math.exp(c.nll):.2f} ({c.rise:+.1f}%)" for c in row) + " |")
    return "\n".join(lines)
