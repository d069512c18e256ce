"""The conclusion of a comparison: three statements, each with the test or interval it rests on.

The paired test is the exact two-sided sign test over excerpts: under the hypothesis that neither method is better, each
is lower on an excerpt with probability 1/2. It needs no assumption about the size of the differences. Excerpts of one
document are not fully independent, so a p-value near the limit is weak evidence.
"""

import math
from dataclasses import dataclass, field

LIMIT = 0.05
"""Largest p-value at which a difference is reported as one."""


def sign_test(below: int, above: int) -> float:
    """p-value of the exact two-sided sign test, from 0 to 1; ties are left out of both counts."""
    count, fewer = below + above, min(below, above)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, math.ldexp(2 * tail, -count))


@dataclass(frozen=True)
class Contrast:
    """One method against another on the same excerpts."""

    other: str
    below: int
    """Excerpts on which the method has the lower NLL."""
    excerpts: int
    difference: float
    """Mean over excerpts of the method's NLL minus the other's, in nats per token."""
    p: float
    """p-value of the exact two-sided sign test over excerpts."""
    ties: int = 0
    """Excerpts on which both have the same NLL."""

    @classmethod
    def of(cls, other: str, own: list[float], its: list[float]) -> "Contrast":
        """Compare the NLL of each excerpt."""
        gaps = [a - b for a, b in zip(own, its, strict=True)]
        below, above = sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps)
        ties = len(gaps) - below - above
        return cls(other, below, len(gaps), sum(gaps) / len(gaps), sign_test(below, above), ties)

    @property
    def outcome(self) -> str:
        """`better`, `worse`, or `too close to call` where the sign test does not separate the two."""
        if self.p >= LIMIT:
            return "too close to call"
        return "better" if self.below * 2 > self.excerpts - self.ties else "worse"

    def text(self) -> str:
        """The contrast in words: "better than yarn (lower on 9 of 9 excerpts, -0.196, p = 0.004)"."""
        lead = {
            "better": f"better than {self.other}",
            "worse": f"worse than {self.other}",
        }.get(self.outcome, f"against {self.other} too close to call")
        return f"{lead} (lower on {self.below} of {self.excerpts} excerpts, {self.difference:+.3f}, p = {self.p:.2g})"


@dataclass(frozen=True)
class TextVerdict:
    """Prediction on one kind of text."""

    text: str
    """Title of the kind of text."""
    contrasts: list[Contrast]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison for one method: prediction, retrieval, short texts."""

    method: str
    length: int
    """Tokens of each excerpt."""
    native: int
    """Tokens of the base's window."""
    texts: list[TextVerdict]
    needles: tuple[float, float, float] | None = None
    """Share of needles found beyond the native window, and its 95% interval."""
    prompts: int = 0
    """Number of prompts that the share is computed from."""
    needles_of: dict[str, float] = field(default_factory=dict)
    """Method -> share of needles found, for other methods."""
    short: dict[str, float] = field(default_factory=dict)
    """Method -> change of NLL inside the native window against the base, in nats per token."""

    def prediction(self, between: str = " ") -> str:
        """Whether long documents are predicted better, on each kind of text, with the paired test.

        Args:
            between: separator of the statements about the kinds of text.
        """
        parts = []
        for each in self.texts:
            contrasts = "; ".join(contrast.text() for contrast in each.contrasts) or "no other row to compare with"
            parts.append(f"{self.method}, {self.length} tokens of {each.text}: {contrasts}.")
        return between.join(parts)

    def retrieval(self) -> str:
        """The share of needles found beyond the native window, with its interval."""
        if self.needles is None:
            return "not measured (eval.retrieval)."
        share, low, high = self.needles
        others = "".join(f", {name} {other:.0%}" for name, other in self.needles_of.items())
        return (
            f"{self.method} finds {share:.0%} (95% interval {low:.0%} to {high:.0%}) of {self.prompts} in prompts "
            f"longer than {self.native} tokens{others}."
        )

    def short_texts(self) -> str:
        """The change of NLL on texts that fit the native window."""
        others = "".join(f", {name} {change:+.3f}" for name, change in self.short.items() if name != self.method)
        return f"{self.method} changes the NLL inside {self.native} tokens by {self.short[self.method]:+.3f}{others}."

    def lines(self) -> dict[str, str]:
        """Title of each statement -> the statement."""
        return {"Prediction": self.prediction(), "Needles": self.retrieval(), "Short texts": self.short_texts()}

    def __str__(self) -> str:
        """The three statements, one per line."""
        return "\n".join(f"{title}: {line}" for title, line in self.lines().items())
