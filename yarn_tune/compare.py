"""Every method on the same held-out tokens: was tuning worth it?

Methods: `none` (the base as it is), `native-window` (the base with its native window slid over the document:
the honest baseline), `linear`, `ntk`, `dynamic`, `yarn` (all search-free, at the recipe's factor) and `tuned`.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .checkpoint import write_json
from .data import heldout_excerpts
from .families import load_model, load_tokenizer, to_device
from .perplexity import Nats, bucket_edges, by_position, full_nats, slid_nats, span_nats
from .rope import (
    default_inv_freq,
    dynamic_ntk_inv_freq,
    linear_inv_freq,
    ntk_inv_freq,
    yarn_attention_factor,
)
from .sections import Recipe
from .train import Run
from .tunable import Learned, Start, attach_fixed, detach

TableOf = Callable[[int], tuple[Tensor, float]]
"""Length read -> (inverse frequencies `[d/2]`, attention factor)."""


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
    tokens_spent: int
    """Training tokens it took to obtain the method's numbers."""
    seconds: float
    """Measuring time."""
    key: str = ""
    """What was measured, hashed: a row with the same key is not measured again."""


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


def methods(start: Start, learned: Learned | None) -> dict[str, TableOf | None]:
    """Method name -> its table; None means the stock module."""
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
    if learned is not None:
        tables["tuned"] = fixed(learned.inv_freq(), learned.attention_factor)
    return tables


def compare(run: Run, learned: Learned | None, only: list[str] | None = None) -> Comparison:
    """Measure every method (or `only` those), writing compare.json into the run folder after each.

    Rows that are there already, of the same method on the same tokens of the same base, are kept.
    """
    recipe = run.recipe
    start = Start.of_recipe(recipe)
    lengths = eval_lengths(recipe, start)
    longest = max(lengths)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    excerpts = heldout_excerpts(recipe, tokenizer, longest, recipe.eval.documents)
    model = to_device(load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype))
    edges = bucket_edges(longest, recipe.eval.buckets)
    spent = recipe.train.steps * recipe.train.batch_rows * recipe.row_tokens()
    documents = [ids for _, ids in excerpts]
    path = run.folder / "compare.json"
    known = _known_rows(path)
    comparison = Comparison(start.native, start.window, edges, [label for label, _ in excerpts], [])
    for method, table_of in tqdm(methods(start, learned).items(), unit="method", file=sys.stderr):
        if only is not None and method not in only:
            continue
        key = _key(recipe, method, table_of, lengths, documents)
        if key not in known:
            measure = _measurer(model, method, table_of, start.native, recipe.eval.stride)
            tokens = spent if method == "tuned" else 0
            row = _row(method, measure, documents, lengths, edges, start.native, tokens)
            known[key] = replace(row, key=key)
        comparison.rows.append(known[key])
        write_json(path, as_json(comparison))
    return comparison


def _known_rows(path: Path) -> dict[str, Row]:
    """Rows of an earlier comparison by key."""
    names = [f.name for f in fields(Row)]
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{name: row[name] for name in names}) for row in saved]
    except (OSError, ValueError, KeyError):
        return {}  # none yet, or written by another version: measure again
    return {row.key: replace(row, nll={int(n): v for n, v in row.nll.items()}) for row in rows}


def _key(recipe: Recipe, method: str, table_of: TableOf | None, lengths: list[int], documents: list[Tensor]) -> str:
    """A hash of everything a row's figures depend on."""
    tables = [] if table_of is None else [(t.tolist(), a) for t, a in map(table_of, lengths)]
    facts = [method, asdict(recipe.base), asdict(recipe.eval), recipe.rope.native, lengths, tables]
    texts = [document.tolist() for document in documents]
    weights = [
        (f.name, f.stat().st_size, f.stat().st_mtime) for f in sorted(Path(recipe.base.model).glob("*.safetensors"))
    ]
    return hashlib.sha256(json.dumps([facts, texts, weights]).encode()).hexdigest()[:16]


def eval_lengths(recipe: Recipe, start: Start) -> list[int]:
    """The recipe's lengths, or the native window doubled up to the window."""
    if recipe.eval.lengths:
        return sorted(set(recipe.eval.lengths))
    lengths = [start.native]
    while lengths[-1] * 2 < start.window:
        lengths.append(lengths[-1] * 2)
    return sorted({*lengths, start.window})


def _measurer(
    model: PreTrainedModel, method: str, table_of: TableOf | None, native: int, stride: int | None
) -> Callable[[Tensor, int], Tensor]:
    """(document, length) -> nats of its first `length` tokens, `[length - 1]`."""

    def measure(document: Tensor, length: int) -> Tensor:
        if table_of is None:
            return slid_nats(model, document[:length], native, stride or max(1, native // 4))
        attach_fixed(model, table_of)
        try:
            return full_nats(model, document[:length])
        finally:
            detach(model)

    return measure


def _row(
    method: str,
    measure: Callable[[Tensor, int], Tensor],
    documents: list[Tensor],
    lengths: list[int],
    edges: list[int],
    native: int,
    tokens_spent: int,
) -> Row:
    """One method over all documents.

    The model is causal, so a document's beginning scores the same whatever follows, and one forward of the
    longest length serves all: except for `dynamic`, whose table depends on the length read.
    """
    begun = time.monotonic()
    per_length = dict.fromkeys(lengths, Nats(0.0, 0))
    buckets = [Nats(0.0, 0)] * (len(edges) - 1)
    short = Nats(0.0, 0)
    inside = min(native, max(lengths))
    for document in documents:
        nats = measure(document, max(lengths))
        buckets = [a + b for a, b in zip(buckets, by_position(nats, edges), strict=True)]
        for length in lengths:
            own = measure(document, length) if method == "dynamic" else nats
            per_length[length] += span_nats(own, 1, length)
        own = measure(document, inside) if method == "dynamic" else nats
        short += span_nats(own, 1, inside)
    return Row(
        method,
        {length: nats.mean for length, nats in per_length.items()},
        [bucket.mean for bucket in buckets],
        short.mean,
        tokens_spent,
        round(time.monotonic() - begun, 2),
    )


def as_json(comparison: Comparison) -> list[dict[str, Any]]:
    """One object a method, each with the edges of its buckets and what it was measured on."""
    common = {"edges": comparison.edges, "native": comparison.native, "excerpts": comparison.excerpts}
    return [asdict(row) | common for row in comparison.rows]


def table(comparison: Comparison) -> str:
    """A Markdown table: nats per token by position bucket, the mean, and inside the native window."""
    edges = comparison.edges
    names = [f"{_short(a)}-{_short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    lines = [
        "| method | " + " | ".join(names) + " | mean | first " + _short(comparison.native) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in comparison.rows:
        cells = [f"{value:.3f}" for value in (*row.by_position, row.nll[max(row.nll)], row.short_nll)]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
