"""Measure every method on the same held-out tokens.

Rows: `none` (the base as it is), `native-window` (the base evaluated with a sliding window of its native length: the
baseline that an extension has to beat), the search-free methods at the recipe's factor, and for every learned run
`tuned` (one pass) and `tuned-slid` (the same model with its native window slid, which shows how much of a gain is
adaptation to the text rather than a longer reach); or `tuned-<run>` where several runs are compared. With
`eval.native_adapted`, `native-adapted` is the control of `native_adapted.py`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..data import excerpt_lengths, grid_lengths, heldout_excerpts, heldout_tokens
from ..errors import UserError
from ..files import locked
from ..models import BaseModel, base_identity
from ..recipe import load_recipe
from ..runs import Run, TunedRow, tuned_row
from ..tunable import Start
from .methods import Method, search_free_methods
from .native_adapted import NAME as NATIVE_ADAPTED
from .native_adapted import learn_native_adapted
from .nll_cache import NllCache
from .perplexity import NllSum, bucket_edges, by_position, span_nll
from .results import COMPARED, CompareRow, Comparison, Kind, TextResult, with_key_tokens
from .retrieval import RetrievalGrid, retrieve_methods


def named_rows(run: Run, others: Sequence[Path]) -> tuple[dict[str, TunedRow], list[Path]]:
    """Rows to add to the search-free ones: (name -> learned numbers, checkpoints to measure as they are).

    The run itself is `tuned`, or `tuned-<name>` beside other runs.

    Raises:
        UserError: if a path is neither a finished run nor a checkpoint, if a run has another base, or if two rows would
            have one name.
    """
    runs, checkpoints = [run] if run.numbers_path.is_file() else [], []
    for path in others:
        if (path / "recipe.yaml").is_file():
            runs.append(_on_same_base(run, Run(load_recipe(path / "recipe.yaml"), path)))
        elif (path / "config.json").is_file():
            checkpoints.append(path)
        else:
            raise UserError(f"{path} is neither a run folder (with recipe.yaml) nor a checkpoint (with config.json)")
    names = ["tuned"] if len(runs) == 1 else [f"tuned-{one.folder.name}" for one in runs]
    every = [*names, *{_slid_name(name) for name in names}, *map(_checkpoint_name, checkpoints)]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise UserError(
            f"compare: {', '.join(twice)} would be the name of two rows, because rows are named after their folders; "
            "name every folder once, and rename one of two that have the same name"
        )
    return {name: tuned_row(one) for name, one in zip(names, runs, strict=True)}, checkpoints


def _on_same_base(run: Run, other: Run) -> Run:
    """The other run, if its numbers belong to the base that is measured."""
    measured, learned = base_identity(run.recipe.base), base_identity(other.recipe.base)
    if learned != measured:
        raise UserError(
            f"{other.folder}: base.model {learned[0]} (revision {learned[1]}) is not the base that is measured here, "
            f"{measured[0]} (revision {measured[1]}); compare that run in a comparison of its own"
        )
    return other


def _checkpoint_name(path: Path) -> str:
    return f"checkpoint {path.parent.name}/{path.name}"


def _slid_name(name: str) -> str:
    return f"{name}-slid"


@dataclass(frozen=True)
class Candidate:
    """A row that is going to be measured."""

    name: str
    kind: Kind
    nll: Callable[[Tensor], tuple[Tensor, float]]
    """A document `[T]` -> its NLL `[T - 1]`, and seconds."""
    method: Method | None = None
    """The method of a row that is measured in one pass; None for other rows."""
    tokens: int = 0
    """Tokens read to learn its numbers."""
    seconds: float = 0.0
    varies: bool = False
    """Whether a checkpoint's table may depend on the length read, as longrope's and dynamic NTK's do."""

    @property
    def by_length(self) -> bool:
        """Whether the NLL of a token depends on the length of its document."""
        return self.varies or (self.method is not None and self.method.by_length)


def candidates(
    run: Run, cache: NllCache, learned: dict[str, TunedRow], checkpoints: Sequence[Path], control: TunedRow | None
) -> list[Candidate]:
    """Every row of a comparison, in the order of the table."""
    start = Start.of(run.base.facts, run.recipe.rope)
    stride = run.recipe.eval.stride_over(start.native)

    def one_pass(method: Method, shared: bool = False) -> Callable[[Tensor], tuple[Tensor, float]]:
        return lambda document: cache.full(method, document, shared)

    def slid(method: Method | None) -> Callable[[Tensor], tuple[Tensor, float]]:
        return lambda document: cache.slid(document, start.native, stride, method)

    methods = search_free_methods(start, run.recipe.eval.methods)
    rows = [Candidate(name, "search-free", one_pass(method, shared=True), method) for name, method in methods.items()]
    rows.insert(1, Candidate("native-window", "slid", slid(None)))
    if control is not None:
        method = Method.of(control.learned)
        rows.insert(2, Candidate(NATIVE_ADAPTED, "slid", slid(method), None, control.tokens, control.seconds))
    for name, row in learned.items():
        method = Method.of(row.learned)
        rows.append(Candidate(name, "learned", one_pass(method), method, row.tokens, row.seconds))
        rows.append(Candidate(_slid_name(name), "slid", slid(method), None, row.tokens, row.seconds))
    for path in checkpoints:
        source = replace(run.recipe.base, model=str(path), revision=None)
        stock = NllCache(BaseModel(source), cache.folder, cache.chunk)
        rows.append(Candidate(_checkpoint_name(path), "checkpoint", stock.stock, varies=_may_vary(stock.base)))
    return rows


def _may_vary(base: BaseModel) -> bool:
    """Whether the table of a checkpoint may depend on the length read; true also where its config is not understood."""
    try:
        scaling = base.facts.scaling
    except UserError:
        return True
    return scaling is not None and scaling.above > 0


def compare(
    run: Run,
    learned: dict[str, TunedRow],
    checkpoints: Sequence[Path] = (),
    only: Sequence[str] | None = None,
) -> Comparison:
    """Measure every method and write compare.json into the run folder; with `only`, measure some and write nothing.

    With `eval.native_adapted` the control is trained first, unless it is finished. The NLL of every token is kept on
    disk, so that an interrupted comparison continues where it was; that of rows without learned numbers for all runs on
    the same base and documents.

    Args:
        run: the run, whose recipe names the base, the documents and the lengths.
        learned: name of a row, such as `tuned` -> learned numbers.
        checkpoints: folders to measure as they are, with the classes of transformers.
        only: names of the rows to measure; None: all.

    Raises:
        UserError: if another process writes in the run folder.
    """
    with locked(run.folder):
        return _compare(run, learned, checkpoints, only)


def _compare(
    run: Run, learned: dict[str, TunedRow], checkpoints: Sequence[Path], only: Sequence[str] | None
) -> Comparison:
    recipe, base = run.recipe, run.base
    start = Start.of(base.facts, recipe.rope)
    lengths = excerpt_lengths(recipe.eval, start.native, start.window)
    edges = bucket_edges(max(lengths), recipe.eval.buckets)
    cache = NllCache(base, run.folder / "nll", recipe.eval.chunk)
    control = learn_native_adapted(run) if only is None or NATIVE_ADAPTED in only else None
    rows = [r for r in candidates(run, cache, learned, checkpoints, control) if only is None or r.name in only]
    ranges = _Ranges(lengths, edges, start.native)
    like = _text_result(run, rows, ranges, "data.heldout")
    unlike = _text_result(run, rows, ranges, "data.heldout_unlike") if recipe.data.heldout_unlike else None
    comparison = Comparison(start.native, start.window, edges, like, unlike)
    if recipe.eval.retrieval is not None:
        comparison = _with_retrieval(run, cache, comparison, rows)
    if only is None:  # readers of compare.json, such as the model card, expect every row
        comparison.save(run.folder / COMPARED)
    return comparison


@dataclass(frozen=True)
class _Ranges:
    """The positions over which means are taken, in tokens."""

    lengths: list[int]
    edges: list[int]
    native: int


def _text_result(run: Run, rows: list[Candidate], ranges: _Ranges, key: str) -> TextResult:
    """All rows on the documents of a recipe key."""
    settings = run.recipe.eval
    excerpts = heldout_excerpts(run.recipe.data, run.base, max(ranges.lengths), settings.documents, key)
    documents = [ids for _, ids in excerpts]
    found: list[CompareRow] = []
    nll: dict[str, list[Tensor]] = {}
    for candidate in tqdm(rows, desc=key, unit="method", file=sys.stderr):
        row, nll[candidate.name] = _row(candidate, documents, ranges)
        found.append(row)
    result = TextResult([label for label, _ in excerpts], found)
    return with_key_tokens(result, nll, settings.key_gain, settings.key_floor)


def _row(candidate: Candidate, documents: list[Tensor], ranges: _Ranges) -> tuple[CompareRow, list[Tensor]]:
    """Measure one method on all documents; returns its row, and its NLL of each document, `[T - 1]`.

    A causal model gives the beginning of a document the same NLL whatever follows, so that one pass over the longest
    length serves all lengths, except where the table depends on the length read.
    """
    longest = max(ranges.lengths)
    per_length = dict.fromkeys(ranges.lengths, NllSum(0.0, 0))
    buckets = [NllSum(0.0, 0)] * (len(ranges.edges) - 1)
    short, seconds, kept = NllSum(0.0, 0), 0.0, []
    inside = min(ranges.native, longest)
    for document in documents:
        nll, took = candidate.nll(document[:longest])
        kept.append(nll)
        seconds += took
        buckets = [a + b for a, b in zip(buckets, by_position(nll, ranges.edges), strict=True)]
        for length in ranges.lengths:
            own = candidate.nll(document[:length])[0] if candidate.by_length else nll
            per_length[length] += span_nll(own, 1, length)
        own = candidate.nll(document[:inside])[0] if candidate.by_length else nll
        short += span_nll(own, 1, inside)
    row = CompareRow(
        method=candidate.name,
        kind=candidate.kind,
        nll={length: total.mean for length, total in per_length.items()},
        by_position=[b.mean for b in buckets],
        short_nll=short.mean,
        tokens_spent=candidate.tokens,
        seconds_spent=candidate.seconds,
        seconds=round(seconds, 2),
        by_excerpt=[span_nll(own, 1, longest).mean for own in kept],
    )
    return row, kept


def _with_retrieval(run: Run, cache: NllCache, comparison: Comparison, rows: list[Candidate]) -> Comparison:
    """Add the retrieval of the base, of search-free YaRN and of every learned row."""
    settings, native = run.recipe.eval.retrieval, comparison.native
    assert settings is not None
    grid = RetrievalGrid.of(settings, grid_lengths(settings, native, run.recipe.rope.window))
    filler = heldout_tokens(run.recipe.data, run.base).tolist()
    chosen = [row for row in rows if row.kind == "learned" or row.name in ("none", "yarn")]
    methods = {row.name: row.method for row in chosen if row.method is not None}
    found = retrieve_methods(cache, methods, filler, grid, run.folder / "retrieval.json", {"none", "yarn"})
    shares = {name: one.accuracy(beyond=native) for name, one in found.items()}
    prompts = max((one.prompts(beyond=native) for one in found.values()), default=0)
    like = replace(comparison.like, rows=[replace(r, retrieved=shares.get(r.method)) for r in comparison.rows])
    return replace(comparison, like=like, prompts=prompts)
