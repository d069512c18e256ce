"""A run's plan and its text."""

from dataclasses import dataclass, field

from ..data import Account, Coverage, RowSet
from ..recipe import METHODS, Recipe
from ..serving import Target
from ..tunable import Start
from .cost import Cost
from .results_cost import ResultsCost


@dataclass(frozen=True)
class Plan:
    """What `yarn-tune plan` prints. A field is None where the base or the documents are not on this machine."""

    recipe: Recipe
    start: Start | None
    learned_numbers: dict[str, int] | None
    """Kind, as in `train.learning_rate` -> how many numbers of it are learned."""
    cost: Cost | None
    rows: RowSet | None
    coverage: Coverage
    """Coverage of the rows; of one whole row if `rows` is None."""
    notes: list[str]
    """Warnings, and what could not be checked."""
    target: Target | None = None
    """The serving stacks."""
    largest_rows: dict[int, int] | None = None
    """GPU memory in GiB -> tokens of the longest row that fits."""
    documents: dict[str, Account] = field(default_factory=dict)
    """Recipe key -> what was read from its files."""
    results: ResultsCost | None = None
    """The cost of the steps after training."""

    @property
    def gpu_hours(self) -> float | None:
        """Hours of training at the rate of one GPU."""
        return None if self.cost is None else self.recipe.train.steps * self.cost.step_flops / GPU / 3600

    def text(self) -> str:
        """The plan in words."""
        recipe = self.recipe
        train, size = recipe.train, recipe.row_tokens()
        lines = [f"{recipe.name}: {recipe.base.model} to a window of {recipe.rope.window} tokens"]
        if self.learned_numbers is not None:
            begin = self.start
            at = f" at factor {begin.factor:g} over a native window of {begin.original}" if begin else ""
            lines.append(
                f"  learns    {_numbers_text(recipe, self.learned_numbers)}, from {METHODS[recipe.rope.method]}{at}"
            )
        if self.start is not None and (scaling := self.start.facts.scaling) is not None:
            lines.append(
                f"  continues the base's own {scaling.rope_type} scaling, which reads {self.start.native} tokens"
            )
        lines.append(
            f"  reads     {train.steps} steps x {train.batch_size} rows x {size} = "
            f"{train.steps * train.batch_size * size:,} tokens"
        )
        lines += [f"  documents {key}: {account.text()}" for key, account in self.documents.items()]
        if self.rows is not None:
            lines.append(f"  rows      {_rows_text(self.rows)}")
        if self.cost is not None:
            cost = self.cost
            flops = train.steps * cost.step_flops
            lines.append(
                f"  costs     {cost.step_flops / 1e12:.3g} TFLOP per step, {flops / 1e15:.3g} PFLOP in all: "
                f"{flops / GPU / 3600:.2g} GPU-hours; {_times(flops)}"
            )
            lines.append(
                f"  memory    {cost.weights_gib:.2f} GiB weights + about {cost.activations_gib:.2f} GiB per process"
            )
        if self.results is not None:
            lines += _results_lines(self.results)
        if self.largest_rows is not None:
            fits = ", ".join(f"{tokens:,} tokens in {gib} GiB" for gib, tokens in self.largest_rows.items())
            lines.append(f"  fits      rows of at most {fits}, read with these settings (computed, not measured)")
        if self.target is not None:
            lines.append(f"  serves    {', '.join(self.target.stacks)}")
        lines += ["  covers    relative distances trained (share of pairs):", *_histogram(self.coverage)]
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


GPU, GPU_FLOAT32, CPU = 1e14, 1.5e13, 1e11
"""Operations per second of a GPU in bfloat16 and in float32, and of two CPU cores, with which times are stated."""


def _times(flops: float, rate: float = GPU) -> str:
    """How long some operations take on a GPU at this rate, and on two CPU cores."""
    return (
        f"about {_duration(flops / rate)} at {rate / 1e12:g} TFLOP/s (a GPU), {_duration(flops / CPU)} at 0.1 "
        "(two CPU cores)"
    )


def _results_lines(results: ResultsCost) -> list[str]:
    prompts = f" and {results.prompts} prompts x {results.readers} methods" if results.prompts else ""
    return [
        f"  compare   {results.excerpts} excerpts x {results.methods} methods ({results.passes} passes){prompts}, "
        f"{results.compare_flops / 1e15:.3g} PFLOP: {_times(results.compare_flops)}; what was measured before is not "
        "measured again",
        f"  export    {results.export_gib:.2f} GiB of files; {results.export_flops / 1e15:.3g} PFLOP in float32: "
        f"{_times(results.export_flops, GPU_FLOAT32)}",
    ]


def _numbers_text(recipe: Recipe, numbers: dict[str, int]) -> str:
    """How many numbers are learned, and of which kinds."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers.items())
    gains = "" if recipe.rope.query_gains == "none" else f", query gains {recipe.rope.query_gains}"
    return f"{sum(numbers.values())} numbers ({recipe.rope.frequencies}{gains}: {kinds})"


def _rows_text(rows: RowSet) -> str:
    packed = rows.packed
    return (
        f"{len(rows.rows)} of {rows.available} rows; "
        f"{packed.whole_rows} rows within one document, {len(packed.rows) - packed.whole_rows} joined or shared, "
        f"{packed.padding} tokens of filler"
    )


def _histogram(covered: Coverage) -> list[str]:
    total = sum(covered.pairs)
    lines = []
    for low, high, pairs in zip(covered.edges, covered.edges[1:], covered.pairs, strict=False):
        share = pairs / total if total else 0.0
        bar = "#" * max(round(40 * share), 1 if pairs else 0)
        lines.append(f"            {low:>7} to {high - 1:<7} {share:6.1%} {bar}")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
