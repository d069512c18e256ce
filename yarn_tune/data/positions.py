"""The position of each token of a row, and the targets that count.

Shapes: a `Placed` row holds three lists of `row_tokens` integers. Position ids that jump by anything but one are
how `transformers` detects document borders when no attention mask is given.
"""

from dataclasses import dataclass, replace

from ..models import IGNORED
from .packing import Row


@dataclass(frozen=True)
class Placed:
    """A row ready for the model. `labels[i]` is the token after `input_ids[i]`, or `IGNORED`."""

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]
    answers: int = 0
    """How many labels before the last one are the answer to a planted question."""

    def pieces(self, length: int, prefix: tuple[int, ...] = ()) -> "list[Placed]":
        """Cut the row into shorter ones, each with positions from zero; all but the first begin with `prefix`.

        Answers do not count, since their needle may be in another piece.
        """
        if length >= len(self.input_ids):
            return [self]
        labels = list(self.labels)
        if self.answers:
            labels[-self.answers - 1 : -1] = [IGNORED] * self.answers
        starts = range(0, len(labels) - length + 1, length)
        ids = self.input_ids
        cut = [Placed(ids[a : a + length], list(range(length)), labels[a : a + length]) for a in starts]
        return [cut[0], *(piece.with_prefix(prefix) for piece in cut[1:])]

    def with_prefix(self, prefix: tuple[int, ...]) -> "Placed":
        """The row with `prefix` in place of the first tokens of every segment; its own tokens are no targets."""
        if not prefix:
            return self
        ids, labels = list(self.input_ids), list(self.labels)
        for at, position in enumerate(self.position_ids):
            if position < len(prefix):
                ids[at] = prefix[position]
                if position:
                    labels[at - 1] = IGNORED
        return replace(self, input_ids=ids, labels=labels)

    @property
    def targets(self) -> int:
        """Tokens whose prediction counts."""
        return sum(label != IGNORED for label in self.labels)


def place_contiguous(row: Row) -> Placed:
    """Positions from zero in every segment; no prediction across segments or of filler."""
    positions: list[int] = []
    labels: list[int] = []
    at = 0
    for number, length in enumerate(row.segments):
        positions += range(length)
        filler = row.padding and number == len(row.segments) - 1
        inner = row.tokens[at + 1 : at + length]
        labels += [IGNORED] * length if filler else [*inner, IGNORED]
        at += length
    return Placed(row.tokens, positions, labels)
