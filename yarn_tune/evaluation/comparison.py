"""Every method on the same held-out tokens: was tuning worth it?

Methods: `none` (the base as it is), `native-window` (the base with its native window slid over the document:
the honest baseline), `linear`, `ntk`, `dynamic`, `yarn` (all search-free, at the recipe's factor), and `tuned` (or
`tuned-<run>` where several runs are compared).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..data import doubled, heldout_excerpts
from ..errors import UserError
from ..files import write_json
from ..models import base_identity
from ..recipe import Recipe, load_recipe
from ..rope import dynamic_ntk_inv_freq, linear_inv_freq, ntk_inv_freq
from ..runs import Run, TunedRow, tuned_row
from ..tunable import Start
from .methods import Method, NllCache, TableOf
from .perplexity import NllSum, bucket_edges, by_position, span_nats
from .recall import retrieve_methods
from .results import Comparison, Row, as_json, key_tokens


def named_rows(run: Run, others: list[Path]) -> tuple[dict[str, TunedRow], list[Path]]:
    """Rows to add to the search-free ones: (name -> learned numbers, checkpoints measured as they are).

    The run itself is `tuned`, or `tuned-<name>` beside other runs.

    Raises:
        UserError: for what is neither a finished run nor a checkpoint, for a run on another base, and for two rows of
            one name.
    """
    runs, checkpoints = [run] if run.numbers_path.is_file() else [], []
    for path in others:
        if (path / "recipe.yaml").is_file():
            runs.append(_on_same_base(run, Run(load_recipe(path / "recipe.yaml"), path)))
        elif (path / "config.json").is_file():
            checkpoints.append(path)
        else:
            raise UserError(f"{path} is neither a run folder (with recipe.yaml) nor a checkpoint (with config.json)")
    names = ["tuned"] if len(runs) == 1 else [f"tuned-{one.folder.name}" for one in runs]
    every = [*names, *map(_checkpoint_name, checkpoints)]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise UserError(
            f"compare: {', '.join(twice)} would be the name of two rows each, which are called after their folders; "
            "name every folder once, and rename one of two that are called alike"
        )
    return {name: tuned_row(one) for name, one in zip(names, runs, strict=True)}, checkpoints


def _on_same_base(run: Run, other: Run) -> Run:
    """The other run, if its numbers belong to the base that is measured."""
    measured, learned = base_identity(run.recipe.base), base_identity(other.recipe.base)
    if learned != measured:
        raise UserError(
            f"{other.folder}: base.model {learned[0]} (revision {learned[1]}) is not the base that is measured here, "
            f"{measured[0]} (revision {measured[1]}); compare it in a comparison of its own"
        )
    return other


def _checkpoint_name(path: Path) -> str:
    return f"checkpoint {path.parent.name}/{path.name}"


def methods(start: Start, tuned: dict[str, TunedRow]) -> dict[str, Method | None]:
    """Method name -> how it rotates; None is the base with its native window slid."""
    facts, native, factor = start.facts, start.native, start.stretch
    theta, dim = facts.theta, facts.dim

    def over(plain: Callable[[int], Tensor]) -> TableOf:
        """A table of unscaled RoPE, laid over what the base already has."""
        multiplier = facts.table(start.window)[1]
        return lambda length: (start.over_base(plain(length)), multiplier)

    found: dict[str, Method | None] = {
        "none": Method(facts.table, by_length=facts.scaling is not None and facts.scaling.above > 0),
        "native-window": None,
        "linear": Method(over(lambda length: linear_inv_freq(theta, dim, factor))),
        "ntk": Method(over(lambda length: ntk_inv_freq(theta, dim, factor))),
        "dynamic": Method(
            over(lambda length: dynamic_ntk_inv_freq(theta, dim, factor, length, native)), by_length=True
        ),
        "yarn": Method.fixed(start.inv_freq(), start.attention_factor),
    }
    return found | {name: Method.of(one.learned) for name, one in tuned.items()}


def compare(
    run: Run, tuned: dict[str, TunedRow], checkpoints: list[Path] | None = None, only: list[str] | None = None
) -> Comparison:
    """Measure every method and write compare.json into the run folder; or `only` some, and write nothing.

    What was measured is kept token by token, so a comparison that was killed goes on where it was.

    Args:
        run: whose recipe names the base, the documents and the lengths.
        tuned: name of a row, such as `tuned` -> learned numbers; each becomes a row.
        checkpoints: folders measured as they are, with stock classes; each becomes a row of its folder's name.
        only: names of methods; what was measured before costs nothing.
    """
    recipe = run.recipe
    start = Start.of(run.base.facts, recipe.rope)
    lengths = eval_lengths(recipe, start)
    excerpts = heldout_excerpts(recipe.data, run.base, max(lengths), recipe.eval.documents)
    documents = [ids for _, ids in excerpts]
    edges = bucket_edges(max(lengths), recipe.eval.buckets)
    cache = NllCache(recipe.base, run.folder / "nats", recipe.eval.chunk, run.base.prefix)
    comparison = Comparison(start.native, start.window, edges, [label for label, _ in excerpts], [])
    measured: dict[str, list[Tensor]] = {}
    for method, how in tqdm(methods(start, tuned).items(), unit="method", file=sys.stderr):
        if only is not None and method not in only:
            continue
        measure = _measurer(cache, how, start.native, recipe.eval.stride)
        by_length = how is not None and how.by_length
        row, measured[method] = _row(method, measure, documents, lengths, edges, start.native, by_length)
        if method in tuned:
            row = replace(row, tokens_spent=tuned[method].tokens, seconds_spent=tuned[method].seconds)
        comparison.rows.append(row)
    for path in checkpoints or []:
        stock = NllCache(replace(recipe.base, model=str(path), revision=None), run.folder / "nats", recipe.eval.chunk)
        name = _checkpoint_name(path)
        row, measured[name] = _row(name, lambda d, n: stock.stock(d[:n]), documents, lengths, edges, start.native)  # noqa: B023
        comparison.rows.append(row)
    comparison = key_tokens(comparison, measured, recipe.eval.key_gain, recipe.eval.key_floor)
    if recipe.eval.retrieval is not None:
        comparison = _with_retrieval(run, cache, comparison, methods(start, tuned), tuned)
    if only is None:  # what reads it, such as the card of an export, counts on every method
        write_json(run.folder / "compare.json", as_json(comparison))
    return comparison


def eval_lengths(recipe: Recipe, start: Start) -> list[int]:
    """The recipe's lengths, or the native window doubled up to the window."""
    return sorted(set(recipe.eval.lengths or doubled(start.native, start.window)))


Measure = Callable[[Tensor, int], tuple[Tensor, float]]
"""(document, length) -> nats of its first `length` tokens `[length - 1]`, and seconds."""


def _measurer(cache: NllCache, how: Method | None, native: int, stride: int | None) -> Measure:
    def measure(document: Tensor, length: int) -> tuple[Tensor, float]:
        if how is None:
            return cache.slid(document[:length], native, stride or max(1, native // 4))
        return cache.tabled(how, document[:length])

    return measure


def _row(
    method: str,
    measure: Measure,
    documents: list[Tensor],
    lengths: list[int],
    edges: list[int],
    native: int,
    by_length: bool = False,
) -> tuple[Row, list[Tensor]]:
    """One method over all documents, and its nats of each, `[T - 1]`.

    The model is causal, so a document's beginning scores the same whatever follows, and one forward of the
    longest length serves all: except where the table depends on the length read.
    """
    per_length = dict.fromkeys(lengths, NllSum(0.0, 0))
    buckets = [NllSum(0.0, 0)] * (len(edges) - 1)
    short, seconds, kept = NllSum(0.0, 0), 0.0, []
    inside = min(native, max(lengths))
    for document in documents:
        nats, took = measure(document, max(lengths))
        kept.append(nats)
        seconds += took
        buckets = [a + b for a, b in zip(buckets, by_position(nats, edges), strict=True)]
        for length in lengths:
            own = measure(document, length)[0] if by_length else nats
            per_length[length] += span_nats(own, 1, length)
        own = measure(document, inside)[0] if by_length else nats
        short += span_nats(own, 1, inside)
    excerpts = [span_nats(own, 1, max(lengths)).mean for own in kept]
    means = {length: nats.mean for length, nats in per_length.items()}
    row = Row(method, means, [b.mean for b in buckets], short.mean, seconds=round(seconds, 2), by_excerpt=excerpts)
    return row, kept


def _with_retrieval(
    run: Run, cache: NllCache, comparison: Comparison, hows: dict[str, Method | None], tuned: dict[str, TunedRow]
) -> Comparison:
    """Needles for the base, for search-free YaRN and for everything tuned."""
    rows = {row.method for row in comparison.rows} & {"none", "yarn", *tuned}
    asked = {name: how for name, how in hows.items() if name in rows and how is not None}
    found = retrieve_methods(run, cache, asked, comparison.native)
    shares = {name: one.accuracy(beyond=comparison.native) for name, one in found.items()}
    return replace(comparison, rows=[replace(row, retrieved=shares.get(row.method)) for row in comparison.rows])
