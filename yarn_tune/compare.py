"""Every method on the same held-out tokens: was tuning worth it?

Methods: `none` (the base as it is), `native-window` (the base with its native window slid over the document:
the honest baseline), `linear`, `ntk`, `dynamic`, `yarn` (all search-free, at the recipe's factor), `tuned` (or
`tuned-<run>` where several runs are compared) and `search`.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import write_json
from .data import heldout_excerpts
from .errors import UserError
from .export import learned_of
from .families import load_tokenizer
from .measure import Meter, TableOf
from .perplexity import Nats, bucket_edges, by_position, span_nats
from .recall import recall
from .recipe import load_recipe
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
    retrieved: tuple[float, float, float] | None = None
    """Share of needles found in prompts longer than the native window, and its 95% interval."""


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


def named_rows(run: Run, others: list[Path]) -> tuple[dict[str, Tuned], list[Path]]:
    """Rows to add to the search-free ones: (name -> learned numbers, checkpoints measured as they are).

    The run itself is `tuned`, or `tuned-<name>` beside other runs; a run that searched is `search`.

    Raises:
        UserError: for what is neither a finished run nor a checkpoint.
    """
    runs, checkpoints = [run] if run.numbers_path.is_file() else [], []
    for path in others:
        if (path / "recipe.yaml").is_file():
            runs.append(Run(load_recipe(path / "recipe.yaml"), path))
        elif (path / "config.json").is_file():
            checkpoints.append(path)
        else:
            raise UserError(f"{path} is neither a run folder (with recipe.yaml) nor a checkpoint (with config.json)")
    kinds = ["search" if one.recipe.rope.learn == "search" else "tuned" for one in runs]
    names = [k if kinds.count(k) == 1 else f"{k}-{one.folder.name}" for k, one in zip(kinds, runs, strict=True)]
    return {name: tuned_of(one) for name, one in zip(names, runs, strict=True)}, checkpoints


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


def compare(
    run: Run, tuned: dict[str, Tuned], checkpoints: list[Path] | None = None, only: list[str] | None = None
) -> Comparison:
    """Measure every method (or `only` those), writing compare.json into the run folder after each.

    Args:
        run: whose recipe names the base, the documents and the lengths.
        tuned: name of a row, such as `tuned` -> learned numbers; each becomes a row.
        checkpoints: folders measured as they are, with stock classes; each becomes a row of its folder's name.
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
    for path in checkpoints or []:
        stock = Meter(replace(recipe.base, model=str(path), revision=None), run.folder / "nats", recipe.eval.chunk)
        name = f"checkpoint {path.parent.name}/{path.name}"
        row, measured[name] = _row(name, lambda d, n: stock.stock(d[:n]), documents, lengths, edges, start.native)  # noqa: B023
        comparison.rows.append(row)
    comparison = key_tokens(comparison, measured, recipe.eval.key_gain, recipe.eval.key_floor)
    if recipe.eval.retrieval is not None:
        comparison = _with_retrieval(run, comparison, methods(start, tuned), tuned)
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


def _with_retrieval(
    run: Run, comparison: Comparison, tables: dict[str, TableOf | None], tuned: dict[str, Tuned]
) -> Comparison:
    """Needles for the base, for search-free YaRN and for everything tuned."""
    rows = {row.method for row in comparison.rows} & {"none", "yarn", *tuned}
    asked = {name: table for name, table in tables.items() if name in rows and table is not None}
    found = recall(run, asked, comparison.native)
    shares = {name: one.accuracy(beyond=comparison.native) for name, one in found.items()}
    return replace(comparison, rows=[replace(row, retrieved=shares.get(row.method)) for row in comparison.rows])


def key_tokens(comparison: Comparison, nats: dict[str, list[Tensor]], gain: float, floor: float) -> Comparison:
    """NLL on the tokens whose prediction needs far context, beside the mean over all tokens.

    A token is one if an extended model predicts it better than the slid native window by at least `gain` nats, and in
    at most `floor` nats: LongPPL's two thresholds (arXiv:2410.23771). LongPPL has a strong model as judge; here the
    judges are search-free YaRN and everything learned, whichever is best at the token, so that none of them chooses
    the tokens that suit it. The same tokens count for every method.
    """
    judges = [name for name in nats if name == "yarn" or name.split("-")[0] in ("tuned", "search")]
    if not judges or "native-window" not in nats:
        return comparison
    best = [torch.stack(each).amin(0) for each in zip(*(nats[name] for name in judges), strict=True)]
    pairs = zip(best, nats["native-window"], strict=True)
    keys = [(far <= floor) & (near - far >= gain) for far, near in pairs]
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


def of_json(rows: list[dict[str, Any]], window: int) -> Comparison:
    """The inverse of `as_json`."""
    names = {f.name for f in fields(Row)}
    made = []
    for row in rows:
        values = {k: v for k, v in row.items() if k in names}
        values["nll"] = {int(n): v for n, v in row["nll"].items()}
        values["retrieved"] = tuple(row["retrieved"]) if row.get("retrieved") else None
        made.append(Row(**values))
    return Comparison(rows[0]["native"], window, rows[0]["edges"], rows[0]["excerpts"], made)


def table(comparison: Comparison) -> str:
    """A Markdown table: nats per token by position bucket and in the mean, PPL, and what the method costs.

    `short tax` is the change inside the native window against the base as it is; `key tokens` the mean over tokens
    that need far context; `retrieved` the share of needles found beyond the native window.
    """
    edges = comparison.edges
    names = [f"{_short(a)}-{_short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    keyed = any(row.key_nll is not None for row in comparison.rows)
    asked = any(row.retrieved is not None for row in comparison.rows)
    extra = [*(["key tokens"] if keyed else []), *(["retrieved"] if asked else [])]
    titles = ["method", *names, "mean", "PPL", "short tax", *extra, "tokens spent"]
    base = {row.method: row.short_nll for row in comparison.rows}.get("none", math.nan)
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in comparison.rows:
        mean = row.nll[max(row.nll)]
        cells = [f"{value:.3f}" for value in (*row.by_position, mean)]
        cells += [f"{math.exp(mean):.2f}", f"{row.short_nll - base:+.3f}"]
        cells += [f"{row.key_nll:.3f}"] if row.key_nll is not None else []
        cells += [("-" if row.retrieved is None else f"{row.retrieved[0]:.0%}")] if asked else []
        cells += [_millions(row.tokens_spent)]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens else "0"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
