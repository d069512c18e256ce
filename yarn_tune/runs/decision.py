"""The decision at the end of a run: which of the learned states is kept, by its loss on validation rows."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from ..files import read_checked, write_checked
from ..recipe import METHODS
from .folder import Run

DECISION = "decision.json"
"""The decision of a finished run, in the run folder."""


FEW = 8
"""With fewer rows than this, no number of better rows is significant."""


@dataclass(frozen=True)
class Candidate:
    """A state that the run could keep, and its losses on the validation rows."""

    iterate: str
    """final: the numbers after the last step. average: their mean over the last half of the steps. step N: those of the
    checkpoint after N steps."""
    factor: float
    """Multiplier of the offsets from the start, search-free YaRN; with 0 the candidate is the start."""
    losses: list[float]
    """The loss of the run's objective, mean over the targets of each validation row."""
    nll: float
    """Mean NLL over the validation rows."""

    @property
    def loss(self) -> float:
        """Mean loss over the rows; infinite if it is not a number."""
        mean = sum(self.losses) / len(self.losses)
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Decision:
    """All candidates, and which one is kept."""

    candidates: list[Candidate]
    """The last one is the start, search-free YaRN."""
    rows: int
    """Number of validation rows."""
    row_tokens: int
    """Tokens per validation row."""
    method: str = "yarn"
    """The search-free method that the run started from: YaRN, or the one that `rope.init` names."""

    @property
    def start(self) -> Candidate:
        """The candidate that is the start of the run, search-free."""
        return self.candidates[-1]

    @property
    def start_name(self) -> str:
        """The name of the start in sentences."""
        return f"search-free {METHODS[self.method]}"

    def better(self, candidate: Candidate) -> int:
        """The number of rows on which a candidate has a lower loss than the start."""
        return sum(own < yarn for own, yarn in zip(candidate.losses, self.start.losses, strict=True))

    @property
    def needed(self) -> int:
        """The number of rows on which a candidate must be better to pass a sign test at the level of 5%.

        The level is divided by the number of candidates (Bonferroni), since the best of several is partly the luckiest.
        With fewer than eight rows no number is significant, and all rows are needed.
        """
        level, chance = 0.05 / (len(self.candidates) - 1), 0.0
        for count in range(self.rows, -1, -1):
            chance += math.comb(self.rows, count) / 2**self.rows
            if chance > level:
                return min(count + 1, self.rows)
        return self.rows

    @property
    def chosen(self) -> Candidate:
        """The candidate with the lowest loss of those that are better than the start on enough rows, else the start."""
        better = [each for each in self.candidates if each.loss < self.start.loss and self.better(each) >= self.needed]
        return min(better, key=lambda candidate: candidate.loss, default=self.start)

    @property
    def keeps_start(self) -> bool:
        """Whether nothing that was learned is kept."""
        return self.chosen is self.start

    def as_json(self) -> dict[str, Any]:
        """All candidates with their losses, and which one is kept."""
        candidates = [
            asdict(each) | {"loss": each.loss, "rows_better": self.better(each), "kept": each is self.chosen}
            for each in self.candidates
        ]
        return {
            "rows": self.rows,
            "row_tokens": self.row_tokens,
            "rows_needed": self.needed,
            "method": self.method,
            "keeps_start": self.keeps_start,
            "candidates": candidates,
        }

    def text(self) -> str:
        """The decision in words, with a table of the candidates."""
        lines = [f"decided on {self.rows} validation rows of {self.row_tokens} tokens:"]
        lines.append(f"  {'iterate':<9} {'factor':>6} {'loss':>9} {'NLL':>9}  rows better than {self.start_name}")
        for each in self.candidates:
            row = f"  {each.iterate:<9} {each.factor:>6g} {each.loss:>9.4f} {each.nll:>9.4f}"
            rows = f"  ({self.start_name})" if each is self.start else f"  {self.better(each)} of {self.rows}"
            lines.append(row + rows + (", kept" if each is self.chosen else ""))
        if self.rows < FEW:
            lines.append(f"  fewer than {FEW} rows prove little: name more validation documents (data.validation)")
        if self.keeps_start:
            lines.append(
                f"  no candidate is better than {self.start_name} on {self.needed} rows or more: the learned offsets "
                "are set to zero, and `export` needs --anyway"
            )
        return "\n".join(lines)


def write_decision(run: Run, decision: Decision) -> None:
    """Write the decision into the run folder; the caller holds its lock."""
    write_checked(run.folder / DECISION, decision.as_json())


def read_decision(run: Run) -> Decision | None:
    """The decision of a finished run; None if the run made none (`train.decide`).

    Raises:
        UserError: if the file is damaged.
    """
    path = run.folder / DECISION
    if not (run.recipe.train.decide and path.is_file()):
        return None
    about = read_checked(path, "train again to make the decision anew")
    candidates = [
        Candidate(each["iterate"], each["factor"], each["losses"], each["nll"]) for each in about["candidates"]
    ]
    return Decision(candidates, about["rows"], about["row_tokens"], about.get("method", "yarn"))


def check_worth_serving(run: Run) -> None:
    """Refuse to export a run that learned nothing better than search-free YaRN.

    Raises:
        UserError: if the decision of the run was for search-free YaRN.
    """
    decision = read_decision(run)
    if decision is not None and decision.keeps_start:
        raise UserError(
            f"{run.folder}: nothing that was learned is better than {decision.start_name} on {decision.needed} of "
            f"{decision.rows} validation rows or more ({DECISION}), so an export would serve {decision.start_name}; "
            "train on more documents or with lower rates, or pass --anyway"
        )
