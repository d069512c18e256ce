"""The result of a comparison: one row per method and kind of text, JSON, tables, and key tokens."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_checked, write_checked
from .verdict import Contrast, TextVerdict, Verdict

Kind = Literal["search-free", "slid", "learned", "checkpoint"]
"""search-free: one pass, nothing learned. slid: a native window slid over the document. learned: one pass, learned
numbers. checkpoint: a folder measured as it is."""


@dataclass(frozen=True)
class CompareRow:
    """One method on one kind of text; NLL in nats per token, over the same tokens for every method."""

    method: str
    kind: Kind
    nll: dict[int, float]
    """Length -> mean over tokens at positions below that length."""
    by_position: list[float]
    """Mean of each of several equal position ranges of the longest length."""
    short_nll: float
    """Mean inside the native window."""
    tokens_spent: int = 0
    """Tokens read to learn the method's numbers."""
    seconds_spent: float = 0.0
    """Time to learn the method's numbers."""
    seconds: float = 0.0
    """Time to measure the row."""
    key_nll: float | None = None
    """Mean over key tokens; see `with_key_tokens`."""
    key_tokens: int = 0
    retrieved: tuple[float, float, float] | None = None
    """Share of needles found in prompts longer than the native window, and its 95% interval."""
    by_excerpt: list[float] = field(default_factory=list)
    """Mean of each held-out excerpt over the longest length."""

    @property
    def longest(self) -> float:
        """Mean NLL over the longest length."""
        return self.nll[max(self.nll)]


@dataclass(frozen=True)
class TextResult:
    """All methods on the excerpts of one kind of text."""

    excerpts: list[str]
    """A label per excerpt."""
    rows: list[CompareRow]

    def row(self, method: str) -> CompareRow:
        """The row of one method.

        Raises:
            KeyError: if the method was not measured.
        """
        found = next((row for row in self.rows if row.method == method), None)
        if found is None:
            raise KeyError(method)
        return found

    def base_short_nll(self) -> float:
        """The base's NLL inside its native window, where sliding it changes nothing; NaN if it was not measured."""
        return next((row.short_nll for row in self.find("none", "native-window")), math.nan)

    def find(self, *methods: str) -> list[CompareRow]:
        """The rows of these methods, as far as they were measured."""
        return [row for row in self.rows if row.method in methods]


COMPARED = "compare.json"
"""Name of the file in a run folder with the comparison."""


@dataclass(frozen=True)
class Comparison:
    """All methods on held-out text like the training text and, where the recipe names some, on text unlike it."""

    native: int
    """Tokens of the base's window."""
    window: int
    """Tokens of the extended window."""
    edges: list[int]
    """Edges of the position ranges."""
    like: TextResult
    """Results on `data.heldout`."""
    unlike: TextResult | None = None
    """Results on `data.heldout_unlike`: other authors and genres."""
    prompts: int = 0
    """Retrieval prompts longer than the native window, per method."""

    @property
    def rows(self) -> list[CompareRow]:
        """All rows on text like the training text."""
        return self.like.rows

    @property
    def texts(self) -> dict[str, TextResult]:
        """Title of a kind of text -> its results."""
        found = {"held-out text like the training text": self.like}
        return found if self.unlike is None else {**found, "held-out text unlike the training text": self.unlike}

    def row(self, method: str) -> CompareRow:
        """The row of one method on text like the training text; raises as `TextResult.row`."""
        return self.like.row(method)

    def subject(self) -> str:
        """The method that the verdict is about: the best learned row, a checkpoint, or else YaRN."""
        for kind in ("learned", "checkpoint"):
            if rows := [row for row in self.rows if row.kind == kind]:
                return min(rows, key=lambda row: row.longest).method
        return "yarn"

    def verdict(self, method: str | None = None) -> Verdict:
        """The conclusion for one method, by default for `subject()`."""
        method = method or self.subject()
        own = self.row(method)
        others = [row for row in self.like.find("none", "yarn") if row.method != method]
        return Verdict(
            method=method,
            length=max(own.nll),
            native=self.native,
            texts=[_text_verdict(title, result, method) for title, result in self.texts.items()],
            needles=own.retrieved,
            prompts=self.prompts,
            needles_of={row.method: row.retrieved[0] for row in others if row.retrieved},
            short={row.method: row.short_nll - self.like.base_short_nll() for row in [own, *self.like.find("yarn")]},
        )

    def save(self, path: Path) -> None:
        """Write the comparison as JSON."""
        write_checked(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            UserError: if the file is not a comparison, or changed since it was written.
        """
        tree = read_checked(path, "delete it, and run `yarn-tune compare` again")
        try:
            texts = {name: tree[name] and _text_result(tree[name]) for name in ("like", "unlike")}
            return cls(**{**tree, **texts})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a comparison ({error!r}); run `yarn-tune compare` again") from error


REFERENCES = ("yarn", "native-window", "native-adapted")
"""Methods that the verdict compares a method with, if they were measured."""


def _text_verdict(title: str, result: TextResult, method: str) -> TextVerdict:
    own = result.row(method)
    others = [row for name in REFERENCES for row in result.find(name) if name != method and row.by_excerpt]
    return TextVerdict(title, [Contrast.of(other.method, own.by_excerpt, other.by_excerpt) for other in others])


def _text_result(tree: dict[str, Any]) -> TextResult:
    names = {f.name for f in fields(CompareRow)}
    rows = []
    for row in tree["rows"]:
        values = {name: value for name, value in row.items() if name in names}
        values["nll"] = {int(length): value for length, value in row["nll"].items()}
        values["retrieved"] = tuple(row["retrieved"]) if row.get("retrieved") else None
        rows.append(CompareRow(**values))
    return TextResult(tree["excerpts"], rows)


def with_key_tokens(result: TextResult, nll: dict[str, list[Tensor]], gain: float, floor: float) -> TextResult:
    """Add the mean NLL over the tokens whose prediction needs far context (key tokens) to every row.

    A key token is one that a method with the whole context predicts better than the slid native window by at least
    `gain`, and with an NLL of at most `floor`: LongPPL's two thresholds (arXiv:2410.23771). LongPPL decides with a
    strong model; here the best of search-free YaRN and all learned rows decides at each token, so that no row chooses
    the tokens that suit it. The same tokens are used for every method.

    Args:
        result: rows of one kind of text.
        nll: method -> NLL of each excerpt, `[T - 1]`.
        gain: nats.
        floor: nats.
    """
    deciding = [row.method for row in result.rows if row.method == "yarn" or row.kind == "learned"]
    if not deciding or "native-window" not in nll:
        return result
    best = [torch.stack(each).amin(0) for each in zip(*(nll[name] for name in deciding), strict=True)]
    pairs = zip(best, nll["native-window"], strict=True)
    keys = [(far <= floor) & (near - far >= gain) for far, near in pairs]
    count = sum(int(key.sum()) for key in keys)
    if not count:
        return result

    def mean(method: str) -> float:
        chosen = torch.cat([values[key] for values, key in zip(nll[method], keys, strict=True)])
        return chosen.double().mean().item()

    rows = [replace(row, key_nll=mean(row.method), key_tokens=count) for row in result.rows]
    return replace(result, rows=rows)


def table(result: TextResult, edges: list[int]) -> str:
    """A Markdown table of one kind of text: NLL per token by position range and in the mean, PPL, and the costs.

    `short tax` is the change inside the native window against the base as it is; `key tokens` the mean over tokens
    that need far context; `retrieved` the share of needles found beyond the native window.
    """
    names = [f"{_short(a)}-{_short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    keyed = any(row.key_nll is not None for row in result.rows)
    retrieved = any(row.retrieved is not None for row in result.rows)
    extra = [*(["key tokens"] if keyed else []), *(["retrieved"] if retrieved else [])]
    titles = ["method", *names, "mean", "PPL", "short tax", *extra, "tokens spent"]
    base = result.base_short_nll()
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in result.rows:
        cells = [f"{value:.3f}" for value in (*row.by_position, row.longest)]
        cells += [f"{math.exp(row.longest):.2f}", f"{row.short_nll - base:+z.3f}"]
        cells += [("-" if row.key_nll is None else f"{row.key_nll:.3f}")] if keyed else []
        cells += [("-" if row.retrieved is None else f"{row.retrieved[0]:.0%}")] if retrieved else []
        cells += [_millions(row.tokens_spent)]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(comparison: Comparison) -> str:
    """The table of every kind of text, each under a line that names the text where there are two."""
    if comparison.unlike is None:
        return table(comparison.like, comparison.edges)
    parts = []
    for title, result in comparison.texts.items():
        parts.append(f"NLL on {title} ({len(result.excerpts)} excerpts):\n\n{table(result, comparison.edges)}")
    return "\n\n".join(parts)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens else "0"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
