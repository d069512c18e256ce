"""Plan a run: what it will read, cover and cost. Nothing is trained and nothing is downloaded."""

from pathlib import Path

import numpy as np

from ..data import Account, RowSet, check_heldout, pack_long, place_contiguous
from ..errors import UserError
from ..models import GIB, BaseModel, without_network
from ..recipe import HUB, METHODS, Recipe, missing_files, published_sizes
from ..runs import previous_run
from ..serving import Target, check_mergeable, config_errors, make_representable
from ..training import split_rows
from ..tunable import TunableRotary, at_start, lora_size
from .cost import estimate_cost
from .memory import largest_rows
from .plan_text import Plan
from .results_cost import estimate_results
from .shape import Shape


def plan(recipe: Recipe, base: BaseModel, has_checkpoint: bool = False) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: recipe of the run.
        base: its base model.
        has_checkpoint: whether the run has a checkpoint, so that it no longer needs the folder in `rope.init`.

    Raises:
        UserError: if the run would fail. A missing base and missing documents are notes instead if the recipe has a
            command that prepares them, or they are on the hub.
    """
    with without_network():
        return _plan(recipe, base, has_checkpoint)


def _plan(recipe: Recipe, base: BaseModel, has_checkpoint: bool) -> Plan:
    notes: list[str] = []
    present = _is_present(recipe, base, notes)
    if present:
        notes += [f"WARNING: the base's config.json: {text}" for text in config_errors(base.written)]
    published = None if present else published_sizes(recipe.base.model)
    if published is not None:
        base = BaseModel.of_config(recipe.base, published.config)
        notes.append(
            f"the base is not on this machine: numbers, cost and memory are counted from its sizes as published in "
            f"{published.source}; a scaling of RoPE in its config, and what serves it, were not read"
        )
    begin = at_start(base, recipe.rope) if present or published else None
    notes += base.notes() if present else []
    if recipe.rope.init not in METHODS:
        notes.append(_init_text(recipe, has_checkpoint, present))
    rows, documents = None, dict[str, Account]()
    if begin is not None and present:
        documents = _check_heldout(recipe, base, begin.start.native, notes)
        rows = _rows(recipe, base, notes)
        documents = ({"data.train": rows.account} if rows else {}) | documents
        notes += [note for key, account in documents.items() for note in account.notes(key)]
    if rows is not None and len(rows.rows) < recipe.rows():
        notes.append(f"the run reads {recipe.rows()} rows but the documents give {len(rows.rows)}: some are read again")
    covered = (rows or _one_row(recipe, notes)).coverage(recipe.rope.window, recipe.data.lengths)
    if covered.untrained > 0:
        notes.append(_untrained_text(recipe, covered.untrained))
    if begin is None:
        return Plan(recipe, None, None, None, rows, covered, notes)
    target = _target(recipe, base, begin, notes) if present else None
    shape = Shape.of(base.config, lora_size(base.config, recipe.lora), base.facts.native)
    numbers = begin.count()
    cost = estimate_cost(recipe, shape, sum(numbers.values()))
    largest = largest_rows(recipe, shape, cost.weights_gib * GIB)
    numbers |= {"lora": shape.lora.numbers} if recipe.lora else {}
    return Plan(
        recipe=recipe,
        start=begin.start if present else None,
        learned_numbers=numbers,
        cost=cost,
        rows=rows,
        coverage=covered,
        notes=notes,
        target=target,
        largest_rows=largest,
        documents=documents,
        results=estimate_results(recipe, shape),
    )


def _one_row(recipe: Recipe, notes: list[str]) -> RowSet:
    """One whole row, in place of rows that were not read."""
    tokens = recipe.row_tokens()
    packed = pack_long([np.zeros(tokens, np.int32)], tokens)
    notes.append("the documents were not read; coverage is that of whole rows")
    return RowSet([place_contiguous(row) for row in packed.rows], packed, 1)


def _init_text(recipe: Recipe, has_checkpoint: bool, present: bool) -> str:
    """The note on `rope.init`; raises if the run there does not fit this one."""
    init = recipe.rope.init
    if has_checkpoint:
        return f"rope.init: the run began with the numbers learned in {init}"
    if not Path(init).is_dir():
        return f"rope.init: {init} does not exist yet; training needs it"
    if not present:
        return f"rope.init: whether {init} fits this run cannot be checked without the base"
    earlier = previous_run(recipe)
    cost = f", from {earlier.tokens:,} tokens" if earlier is not None and earlier.tokens else ""
    return f"rope.init: the run begins with the numbers learned in {init}{cost}"


def _untrained_text(recipe: Recipe, share: float) -> str:
    """The note on distances that no row trains."""
    text = f"{share:.0%} of the target window's distances are never trained"
    # Gains, phases and LoRA do not depend on the distance; on SmolLM2 rows of half the window trained phases as well as
    # whole rows.
    if recipe.rope.frequencies == "fixed" and share <= 0.5:
        return f"{text}; what this run learns acts at all distances alike, so they need not be"
    return f"WARNING: {text}; use longer rows (data.row_tokens, data.lengths), data.packing: long, or longer documents"


def _target(recipe: Recipe, base: BaseModel, begin: TunableRotary, notes: list[str]) -> Target:
    """The serving stacks; raises if one that the recipe names cannot serve the run."""
    target = Target.of_model(base, recipe.export, recipe.rope)
    make_representable(begin.learned(), target)
    check_mergeable(target.base, recipe.lora)
    notes += [f"not served: {name} {reason}" for name, reason in (target.left_out or {}).items()]
    return target


def _is_present(recipe: Recipe, base: BaseModel, notes: list[str]) -> bool:
    """Whether the base's config is on this machine; if not, adds a note on how to get it."""
    try:
        present = base.is_local
    except UserError:
        if not recipe.base.prepare:
            raise
        notes.append(f"the base does not exist yet: run `{recipe.base.prepare}`")
        return False
    if not present:
        notes.append(f"{recipe.base.model} is not in the local hub cache, so documents were not read")
    return present


def _check_heldout(recipe: Recipe, base: BaseModel, native: int, notes: list[str]) -> dict[str, Account]:
    """The contents of the held-out files, by recipe key; adds a note about files that were not checked.

    Raises:
        UserError: for documents on which `compare` could not measure.
    """
    named = [name for names in recipe.data.heldout_files().values() for name in names]
    absent = missing_files(named)
    if any(name.startswith(HUB) for name in named):
        notes.append("held-out documents are streamed from the hub; whether they are long enough was not checked")
    elif not absent:
        return check_heldout(recipe.data, recipe.eval, base, native, recipe.rope.window)
    elif not recipe.data.prepare:
        keys = ", ".join(key for key, names in recipe.data.heldout_files().items() if missing_files(names))
        notes.append(f"{keys}: no file matches {', '.join(absent)}; training and `compare` need it")
    return {}


def _rows(recipe: Recipe, base: BaseModel, notes: list[str]) -> RowSet | None:
    """The run's rows if all documents are on this machine."""
    if any(name.startswith(HUB) for name in recipe.data.train):
        notes.append("documents are streamed from the hub, so a plan does not read them")
        return None
    if missing_files(recipe.data.named_files()) and recipe.data.prepare:
        notes.append(f"the documents do not exist yet: run `{recipe.data.prepare}`")
        return None
    rows, validation = split_rows(recipe, base)
    if validation is not None:
        own = recipe.data.validation
        source = "of data.validation" if own else f"of {validation.packed.documents} documents that are held back"
        notes.append(f"train.decide: the run ends with a decision on {len(validation.rows)} validation rows {source}")
    return rows
