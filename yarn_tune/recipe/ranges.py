"""Ranges of recipe values, written beside the field: `steps: Annotated[int, AtLeast(1)] = 100`.

`parsing` checks these annotations and `keys` lists them. A string among the annotations is the reason for the range,
and is added to the message.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol

LONGEST_NAME = 200
"""Most bytes of a folder name. File systems allow 255, and the names of partial files are longer."""


class Constraint(Protocol):
    """A condition on one value."""

    def holds(self, value: Any) -> bool:
        """Whether the value, which has the field's type, meets the condition."""
        ...

    @property
    def text(self) -> str:
        """The condition as words that follow "must"."""
        ...


@dataclass(frozen=True)
class AtLeast:
    """A number not below `low`."""

    low: float

    def holds(self, value: float) -> bool:
        """See `Constraint`."""
        return value >= self.low

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return f"be at least {self.low}"


@dataclass(frozen=True)
class AtMost:
    """A number not above `high`."""

    high: float

    def holds(self, value: float) -> bool:
        """See `Constraint`."""
        return value <= self.high

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return f"be at most {self.high}"


@dataclass(frozen=True)
class Bound(AtMost):
    """A limit far above every sensible value, which keeps loops finite; a message names it only if it is exceeded."""


@dataclass(frozen=True)
class Above:
    """A number greater than `low`."""

    low: float

    def holds(self, value: float) -> bool:
        """See `Constraint`."""
        return value > self.low

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return f"be greater than {self.low}"


@dataclass(frozen=True)
class Below:
    """A number less than `high`."""

    high: float

    def holds(self, value: float) -> bool:
        """See `Constraint`."""
        return value < self.high

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return f"be less than {self.high}"


@dataclass(frozen=True)
class NotEmpty:
    """A text or a list that is not empty."""

    def holds(self, value: str | list[Any]) -> bool:
        """See `Constraint`."""
        return len(value) > 0

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return "not be empty"


@dataclass(frozen=True)
class FolderName:
    """A name for one folder, not a path."""

    def holds(self, value: str) -> bool:
        """See `Constraint`."""
        fits = 0 < len(value.encode(errors="replace")) <= LONGEST_NAME
        return fits and value.isprintable() and "/" not in value and value not in (".", "..")

    @property
    def text(self) -> str:
        """See `Constraint`."""
        return f"be a folder name of at most {LONGEST_NAME} bytes, without slashes and control characters"


Count = Annotated[int, AtLeast(1), Bound(10_000_000)]
Length = Annotated[int, AtLeast(2), Bound(100_000_000)]
"""A number of tokens that has at least one prediction."""
Share = Annotated[float, AtLeast(0), AtMost(1)]
Rate = Annotated[float, Above(0), Bound(1e6)]
Weight = Annotated[float, AtLeast(0)]
Files = Annotated[list[str], NotEmpty(), "name at least one file"]
