"""What a run will read, cover and cost, before it starts. Never trains and never downloads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import Coverage, RowRequest, RowSet, build_rows, check_heldout, pack_long, place_contiguous
from ..errors import UserError
from ..models import GIB, BaseModel
from ..recipe import HUB, YARN, Recipe, missing_files
from ..runs import previous_run
from ..serving import Target, check_mergeable, make_representable
from ..tunable import Start, TunableRotary, at_start, lora_size
from .cost import Cost, estimate_cost, largest_rows


@dataclass(frozen=True)
class Plan:
    """Everything `yarn-tune plan` prints; None where the base or the documents are not at hand."""

    recipe: Recipe
    start: Start | None
    learned_numbers: dict[str, int] | None
    """By kind, as `train.learning_rate` names them."""
    cost: Cost | None
    rows: RowSet | None
    coverage: Coverage
    notes: list[str]
    target: Target | None = None
    largest_rows: dict[int, int] | None = None
    """GPU memory in GiB -> tokens of the longest row that fits."""

    def text(self) -> str:
        """For people."""
        recipe = self.recipe
        train, size = recipe.train, recipe.row_tokens()
        lines = [f"{recipe.name}: {recipe.base.model} to a window of {recipe.rope.window} tokens"]
        if self.start is not None:
            lines.append(
                f"  learns    {_numbers_text(recipe, self.learned_numbers or {})}, from YaRN at factor "
                f"{self.start.factor:g} over a native window of {self.start.original}"
            )
            if (scaling := self.start.facts.scaling) is not None:
                lines.append(
                    f"  continues the base's own {scaling.rope_type} scaling, which reads {self.start.native} tokens"
                )
        lines.append(
            f"  reads     {train.steps} steps x {train.batch_size} rows x {size} = "
            f"{train.steps * train.batch_size * size:,} tokens"
        )
        if self.rows is not None:
            lines.append(f"  rows      {_rows_text(self.rows)}")
        if self.cost is not None:
            cost = self.cost
            flops = train.steps * cost.step_flops
            lines.append(
                f"  costs     {cost.step_flops / 1e12:.3g} TFLOP a step, {flops / 1e15:.3g} PFLOP "
                f"in all: about {_duration(flops / 1e14)} at 100 TFLOP/s (a GPU), {_duration(flops / 1e11)} "
                "at 0.1 (two CPU cores)"
            )
            lines.append(
                f"  memory    {cost.weights_gib:.2f} GiB weights + about {cost.activations_gib:.2f} GiB a process"
            )
        if self.largest_rows is not None:
            fits = ", ".join(f"{tokens:,} in {gib} GiB" for gib, tokens in self.largest_rows.items())
            lines.append(f"  fits      rows of up to so many tokens, read like this: {fits} (computed, not run)")
        if self.target is not None:
            lines.append(f"  serves    {', '.join(self.target.stacks)}")
        lines += ["  covers    relative distances trained (share of pairs):", *_histogram(self.coverage)]
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


def plan(recipe: Recipe, base: BaseModel, begun: bool = False) -> Plan:
    """Work out a recipe's plan; a run that has `begun` needs no earlier one (`rope.init`) any more.

    Raises:
        UserError: for what would stop the run, except a base or documents that the recipe says how to prepare,
            or that are on the hub: those become notes.
    """
    notes: list[str] = []
    present = _is_present(recipe, base, notes)
    begin = at_start(base, recipe.rope) if present else None
    if recipe.rope.init != YARN:
        notes.append(_begins_text(recipe, begun, present))
    rows = None
    if begin is not None:
        _check_heldout(recipe, base, begin.start.native, notes)
        rows = _rows(recipe, base, notes)
    read = rows
    if read is None:
        tokens = recipe.row_tokens()
        packed = pack_long([np.zeros(tokens, np.int32)], tokens)
        read = RowSet([place_contiguous(row) for row in packed.rows], packed, 1)
        notes.append("coverage is that of whole rows, since the documents were not read")
    elif len(read.rows) < recipe.rows():
        notes.append(f"{recipe.rows()} rows are read but the documents give {len(read.rows)}: some are read again")
    covered = read.coverage(recipe.rope.window, recipe.data.lengths)
    if covered.untrained > 0:
        notes.append(_untrained_text(recipe, covered.untrained))
    if begin is None:
        return Plan(recipe, None, None, None, rows, covered, notes)
    target = _target(recipe, base, begin, notes)
    config, native = base.text_config, begin.start.native
    lora = lora_size(config, recipe.lora)
    numbers = begin.count()
    cost = estimate_cost(recipe, config, sum(numbers.values()), lora, native)
    largest = largest_rows(recipe, config, cost.weights_gib * GIB, lora, native)
    numbers |= {"lora": lora.numbers} if recipe.lora else {}
    return Plan(recipe, begin.start, numbers, cost, rows, covered, notes, target, largest)


def _begins_text(recipe: Recipe, begun: bool, readable: bool) -> str:
    """Of the earlier run that this one learns on from; raises if it does not fit."""
    if begun:
        return f"began with what was learned in {recipe.rope.init}"
    if not Path(recipe.rope.init).is_dir():
        return f"rope.init: {recipe.rope.init} is not here yet, which training will ask for"
    if not readable:
        return f"rope.init: whether {recipe.rope.init} fits is not checked without the base"
    earlier = previous_run(recipe)
    cost = f", from {earlier.tokens:,} tokens" if earlier is not None and earlier.tokens else ""
    return f"begins with what was learned in {recipe.rope.init}{cost}"


def _untrained_text(recipe: Recipe, share: float) -> str:
    """What to make of distances that no row trains."""
    said = f"{share:.0%} of the target window's distances are never trained"
    # Gains, phases and LoRA know no distance; on SmolLM2 rows of half the window taught phases as much as whole ones.
    if recipe.rope.frequencies == "fixed" and share <= 0.5:
        return f"{said}, nor need they be: what is learned beside YaRN's table acts at all distances alike"
    return f"WARNING: {said}; use longer rows (data.row_tokens, data.lengths), data.packing: long, or longer documents"


def _target(recipe: Recipe, base: BaseModel, begin: TunableRotary, notes: list[str]) -> Target:
    """The stacks to be served; raises if one of those asked for cannot be."""
    target = Target.of_model(base, recipe.export)
    make_representable(begin.learned(), target)
    check_mergeable(target.base, recipe.lora)
    notes += [f"not served: {name} {reason}" for name, reason in (target.left_out or {}).items()]
    return target


def _numbers_text(recipe: Recipe, numbers: dict[str, int]) -> str:
    """How many numbers are learned, and of which kinds."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers.items())
    gains = "" if recipe.rope.query_gains == "none" else f", query gains {recipe.rope.query_gains}"
    return f"{sum(numbers.values())} numbers ({recipe.rope.frequencies}{gains}: {kinds})"


def _is_present(recipe: Recipe, base: BaseModel, notes: list[str]) -> bool:
    """Whether the base's config is on this machine; where it is not, a note says how to get it."""
    try:
        present = base.is_local
    except UserError:
        if not recipe.base.prepare:
            raise
        notes.append(f"the base is not here yet: run `{recipe.base.prepare}`")
        return False
    if not present:
        notes.append(f"{recipe.base.model} is not in the local hub cache, so cost and documents are not read")
    return present


def _check_heldout(recipe: Recipe, base: BaseModel, native: int, notes: list[str]) -> None:
    """Held-out documents that `compare` could not measure on stop a plan; those that are not here become a note."""
    named = [name for names in recipe.data.heldout_files().values() for name in names]
    absent = missing_files(named)
    if any(name.startswith(HUB) for name in named):
        notes.append("held-out documents are streamed from the hub, so whether they are long enough is not checked")
    elif not absent:
        check_heldout(recipe.data, recipe.eval, base, native, recipe.rope.window)
    elif not recipe.data.prepare:
        places = [key for key, names in recipe.data.heldout_files().items() if missing_files(names)]
        keys = ", ".join(places)
        notes.append(f"{keys}: no file matches {', '.join(absent)}, which training and `compare` will ask for")


def _rows(recipe: Recipe, base: BaseModel, notes: list[str]) -> RowSet | None:
    """The run's rows if all documents are on this machine."""
    if any(name.startswith(HUB) for name in recipe.data.train):
        notes.append("documents are streamed from the hub, so they are not read for a plan")
        return None
    if missing_files([*recipe.data.train, *recipe.data.heldout, *recipe.data.heldout_unlike]) and recipe.data.prepare:
        notes.append(f"documents are not here yet: run `{recipe.data.prepare}`")
        return None
    return build_rows(recipe.data, base, RowRequest(recipe.row_tokens(), recipe.rows(), recipe.train.seed))


def _rows_text(rows: RowSet) -> str:
    packed = rows.packed
    return (
        f"{len(rows.rows)} of {rows.available} rows; {packed.documents} documents, {packed.tokens:,} tokens; "
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
    return f"{seconds:.0f} seconds"
