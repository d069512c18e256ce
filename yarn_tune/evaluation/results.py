"""What a comparison found: its rows, its verdict, its tables, and key tokens."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

SEARCH_FREE = ("none", "native-window", "linear", "ntk", "dynamic", "yarn")
"""Rows for which nothing was learned."""


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
    by_excerpt: list[float] = field(default_factory=list)
    """Of each held-out excerpt, over the longest length."""


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

    def by_excerpt(self) -> str:
        """A line for every learned row and checkpoint: on how many excerpts it is below YaRN and the slid window."""
        lines = []
        for row in self.rows:
            if row.method in SEARCH_FREE or not row.by_excerpt:
                continue
            parts = []
            for other in (self.row("yarn"), self.row("native-window")):
                gaps = [a - b for a, b in zip(row.by_excerpt, other.by_excerpt, strict=True)]
                below = sum(gap < 0 for gap in gaps)
                parts.append(f"{other.method} on {below} of {len(gaps)} ({min(gaps):+.3f} to {max(gaps):+.3f} nats)")
            lines.append(f"By held-out excerpt, {row.method} is below {', below '.join(parts)}.")
        return "\n".join(lines)


def key_tokens(comparison: Comparison, nats: dict[str, list[Tensor]], gain: float, floor: float) -> Comparison:
    """NLL on the tokens whose prediction needs far context, beside the mean over all tokens.

    A token is one if an extended model predicts it better than the slid native window by at least `gain` nats, and in
    at most `floor` nats: LongPPL's two thresholds (arXiv:2410.23771). LongPPL has a strong model as judge; here the
    judges are search-free YaRN and everything learned, whichever is best at the token, so that none of them chooses
    the tokens that suit it. The same tokens count for every method.
    """
    judges = [name for name in nats if name == "yarn" or name.split("-")[0] == "tuned"]
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
        cells += [("-" if row.key_nll is None else f"{row.key_nll:.3f}")] if keyed else []
        cells += [("-" if row.retrieved is None else f"{row.retrieved[0]:.0%}")] if asked else []
        cells += [_millions(row.tokens_spent)]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens else "0"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
