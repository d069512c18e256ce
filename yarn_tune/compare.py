"""Every method on the same held-out tokens: was tuning worth it?

Methods: `none` (the base as it is), `native-window` (the base with its native window slid over the document:
the honest baseline), `linear`, `ntk`, `dynamic`, `yarn` (all search-free, at the recipe's factor), `tuned` (or
`tuned-<run>` where several runs are compared) and `search`.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import write_json
from .data import heldout_excerpts
from .export import learned_of
from .families import load_tokenizer
from .measure import Meter, TableOf
from .perplexity import Nats, bucket_edges, by_position, span_nats
from .rope import (
    default_inv_freq,
    dynamic_ntk_inv_freq,
    linear_inv_freq,
    ntk_inv_freq,
    yarn_attention_factor,
)
from .sections import Recipe
from .train import Run
from .tunable import Learned, Start


@dataclass(frozen=True)
class Tuned:
    """Learned numbers, and what they cost."""

    learned: Learned
    tokens: int
    """Read to obtain them: forward and backward for a gradient, forward for a search."""
    seconds: float


@dataclass(frozen=True)
class Row:
    """One method's figures, all in nats per token over the same tokens."""

    method: str
    nll: dict[int, float]
    """By length: tokens at positions below that length."""
    by_position: list[float]
    """By equal position buckets of the longest length."""
    short_nll: float
    """Inside the native window."""
    tokens_spent: int = 0
    """It took to obtain the method's numbers."""
    seconds_spent: float = 0.0
    seconds: float = 0.0
    """Measuring time, when it was measured."""
    key_nll: float | None = None
    """On key tokens; see `key_tokens`."""
    key_tokens: int = 0


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured on."""

    native: int
    window: int
    edges: list[int]
    excerpts: list[str]
    rows: list[Row]

    def row(self, method: str) -> Row:
        """The row of one method."""
        return next(row for row in self.rows if row.method == method)

    def verdict(self) -> str:
        """One sentence: does extending pay on these documents?"""
        length = max(self.rows[0].nll)
        slid = self.row("native-window").nll[length]
        best = min((r for r in self.rows if r.method not in ("none", "native-window")), key=lambda r: r.nll[length])
        if best.nll[length] < slid:
            return (
                f"{best.method} beats the slid native window at {length} tokens by {slid - best.nll[length]:.4f} nats."
            )
        return (
            f"No extended method beats the native window slid over the document at {length} tokens "
            f"(best: {best.method}, {best.nll[length] - slid:.4f} nats behind): for text like this, reading "
            "with the native window predicts as well, and only retrieval from far away needs the extension."
        )


def tuned_of(run: Run) -> Tuned:
    """A finished run's settled numbers and what they cost.

    Raises:
        UserError: if the run is not finished.
    """
    learned = learned_of(run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Tuned(learned, sum(line["tokens"] for line in lines), round(sum(line["seconds"] for line in lines), 1))


def methods(start: Start, tuned: dict[str, Tuned]) -> dict[str, TableOf | None]:
    """Method name -> its table; None is the base with its native window slid."""
    facts, native, factor = start.facts, start.native, start.factor
    theta, dim = facts.theta, facts.dim

    def fixed(inv_freq: Tensor, attention_factor: float = 1.0) -> TableOf:
        return lambda length: (inv_freq, attention_factor)

    tables: dict[str, TableOf | None] = {
        "none": fixed(default_inv_freq(theta, dim)),
        "native-window": None,
        "linear": fixed(linear_inv_freq(theta, dim, factor)),
        "ntk": fixed(ntk_inv_freq(theta, dim, factor)),
        "dynamic": lambda length: (dynamic_ntk_inv_freq(theta, dim, factor, length, native), 1.0),
        "yarn": fixed(start.inv_freq(), yarn_attention_factor(factor)),
    }
    return tables | {name: fixed(one.learned.inv_freq(), one.learned.attention_factor) for name, one in tuned.items()}


def compare(run: Run, tuned: dict[str, Tuned], only: list[str] | None = None) -> Comparison:
    """Measure every method (or `only` those), writing compare.json into the run folder after each.

    Args:
        run: whose recipe names the base, the documents and the lengths.
        tuned: name of a row, such as `tuned` -> learned numbers; each becomes a row.
        only: names of methods; what was measured before costs nothing.
    """
    recipe = run.recipe
    start = Start.of_recipe(recipe)
    lengths = eval_lengths(recipe, start)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    excerpts = heldout_excerpts(recipe, tokenizer, max(lengths), recipe.eval.documents)
    documents = [ids for _, ids in excerpts]
    edges = bucket_edges(max(lengths), recipe.eval.buckets)
    meter = Meter(recipe.base, run.folder / "nats", recipe.eval.chunk)
    comparison = Comparison(start.native, start.window, edges, [label for label, _ in excerpts], [])
    measured: dict[str, list[Tensor]] = {}
    for method, table_of in tqdm(methods(start, tuned).items(), unit="method", file=sys.stderr):
        if only is not None and method not in only:
            continue
        measure = _measurer(meter, table_of, start.native, recipe.eval.stride)
        row, measured[method] = _row(method, measure, documents, lengths, edges, start.native)
        if method in tuned:
            row = replace(row, tokens_spent=tuned[method].tokens, seconds_spent=tuned[method].seconds)
        comparison.rows.append(row)
        write_json(run.folder / "compare.json", as_json(comparison))
    comparison = key_tokens(comparison, measured, recipe.eval.key_gain, recipe.eval.key_floor)
    write_json(run.folder / "compare.json", as_json(comparison))
    return comparison


def eval_lengths(recipe: Recipe, start: Start) -> list[int]:
    """The recipe's lengths, or the native window doubled up to the window."""
    if recipe.eval.lengths:
        return sorted(set(recipe.eval.lengths))
    lengths = [start.native]
    while lengths[-1] * 2 < start.window:
        lengths.append(lengths[-1] * 2)
    return sorted({*lengths, start.window})


Measure = Callable[[Tensor, int], tuple[Tensor, float]]
"""(document, length) -> nats of its first `length` tokens `[length - 1]`, and seconds."""


def _measurer(meter: Meter, table_of: TableOf | None, native: int, stride: int | None) -> Measure:
    def measure(document: Tensor, length: int) -> tuple[Tensor, float]:
        if table_of is None:
            return meter.slid(document[:length], native, stride or max(1, native // 4))
        return meter.tabled(table_of, document[:length])

    return measure


def _row(
    method: str, measure: Measure, documents: list[Tensor], lengths: list[int], edges: list[int], native: int
) -> tuple[Row, list[Tensor]]:
    """One method over all documents, and its nats of each, `[T - 1]`.

    The model is causal, so a document's beginning scores the same whatever follows, and one forward of the
    longest length serves all: except for `dynamic`, whose table depends on the length read.
    """
    per_length = dict.fromkeys(lengths, Nats(0.0, 0))
    buckets = [Nats(0.0, 0)] * (len(edges) - 1)
    short, seconds, kept = Nats(0.0, 0), 0.0, []
    inside = min(native, max(lengths))
    for document in documents:
        nats, took = measure(document, max(lengths))
        kept.append(nats)
        seconds += took
        buckets = [a + b for a, b in zip(buckets, by_position(nats, edges), strict=True)]
        for length in lengths:
            own = measure(document, length)[0] if method == "dynamic" else nats
            per_length[length] += span_nats(own, 1, length)
        own = measure(document, inside)[0] if method == "dynamic" else nats
        short += span_nats(own, 1, inside)
    means = {length: nats.mean for length, nats in per_length.items()}
    return Row(method, means, [b.mean for b in buckets], short.mean, seconds=round(seconds, 2)), kept


def key_tokens(comparison: Comparison, nats: dict[str, list[Tensor]], gain: float, floor: float) -> Comparison:
    """NLL on the tokens whose prediction needs far context, beside the mean over all tokens.

    A token is one if search-free YaRN, which sees the whole document, predicts it better than the slid native
    window by at least `gain` nats, and in at most `floor` nats: LongPPL's two thresholds (arXiv:2410.23771, section
    3.2), with the base model itself as judge. The same tokens count for every method.
    """
    if not {"yarn", "native-window"} <= nats.keys():
        return comparison
    judged = zip(nats["yarn"], nats["native-window"], strict=True)
    keys = [(far <= floor) & (near - far >= gain) for far, near in judged]
    count = sum(int(key.sum()) for key in keys)
    if not count:
        return comparison

    def mean(method: str) -> float:
        chosen = torch.cat([values[key] for values, key in zip(nats[method], keys, strict=True)])
        return chosen.double().mean().item()

    rows = [replace(row, key_nll=mean(row.method), key_tokens=count) for row in comparison.rows]
    return replace(comparison, rows=rows)


def as_json(comparison: Comparison) -> list[dict[str, Any]]:
    """One object a method, each with the edges of its buckets and what it was measured on."""
    common = {"edges": comparison.edges, "native": comparison.native, "excerpts": comparison.excerpts}
    return [asdict(row) | common for row in comparison.rows]


def table(comparison: Comparison) -> str:
    """A Markdown table: nats per token by position bucket and in the mean, PPL, and what the method costs.

    `short tax` is the change inside the native window against the base as it is.
    """
    edges = comparison.edges
    names = [f"{_short(a)}-{_short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    keyed = any(row.key_nll is not None for row in comparison.rows)
    titles = ["method", *names, "mean", "PPL", "short tax", *(["key tokens"] if keyed else []), "tokens spent"]
    base = {row.method: row.short_nll for row in comparison.rows}.get("none", math.nan)
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in comparison.rows:
        mean = row.nll[max(row.nll)]
        cells = [f"{value:.3f}" for value in (*row.by_position, mean)]
        cells += [f"{math.exp(mean):.2f}", f"{row.short_nll - base:+.3f}"]
        cells += [f"{row.key_nll:.3f}"] if row.key_nll is not None else []
        cells += [_millions(row.tokens_spent)]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens else "0"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
