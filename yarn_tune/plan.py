"""What a run will read, cover and cost, before it starts. Never trains and never downloads.

Cost model. With frozen weights a step is one forward, one backward that computes gradients of activations only
(about one forward), and with checkpointing one more forward: 2 or 3 forwards of 2 x parameters x tokens plus
4 x layers x width x tokens^2 / 2 (causal attention) floating-point operations. A prefix is read in one forward, the
base is asked in one a window, and a gradient from forward passes takes two a direction. Memory counts frozen weights,
what checkpointing keeps (one hidden state a layer and token), a prefix's keys and values, and the working set of one
layer. It is an estimate for choosing a row length, not a promise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .data import RowSet, build_rows, missing_files
from .errors import UserError
from .estimate import ONE_BY_ONE
from .families import is_hub_id, load_config, load_tokenizer
from .learned import Start
from .lessons import Lesson
from .objectives import CHUNK
from .packing import Row
from .positions import Coverage, coverage, place_contiguous
from .sections import Recipe
from .serving.profiles import Target, settle
from .teacher import windows
from .tunable import TunableRotary, at_start


@dataclass(frozen=True)
class Cost:
    """Figures of one step in one process."""

    parameters: int
    step_flops: float
    weights_gib: float
    activations_gib: float


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

    def text(self) -> str:
        """For people."""
        recipe, train = self.recipe, self.recipe.train
        tokens = train.steps * train.batch_rows * recipe.row_tokens()
        lines = [f"{recipe.name}: {recipe.base.model} to a window of {recipe.rope.window} tokens"]
        if self.start is not None:
            lines.append(
                f"  learns    {_numbers_text(recipe, self.learned_numbers or {})}, from YaRN at factor "
                f"{self.start.factor:g} over a native window of {self.start.native}"
            )
        lines.append(
            f"  reads     {train.steps} steps x {train.batch_rows} rows x {recipe.row_tokens()} = {tokens:,} tokens"
        )
        if self.rows is not None:
            lines.append(f"  rows      {_rows_text(self.rows)}")
        if self.cost is not None:
            cost = self.cost
            lines.append(
                f"  costs     {cost.step_flops / 1e12:.3g} TFLOP a step, {cost.step_flops * train.steps / 1e15:.3g} "
                f"PFLOP in all: about {_duration(cost.step_flops * train.steps / 1e14)} at 100 TFLOP/s (a GPU), "
                f"{_duration(cost.step_flops * train.steps / 1e11)} at 0.1 (two CPU cores)"
            )
            lines.append(
                f"  memory    {cost.weights_gib:.2f} GiB weights + about {cost.activations_gib:.2f} GiB a process"
            )
        if self.target is not None:
            lines.append(f"  serves    {', '.join(self.target.stacks)}")
        lines += ["  covers    relative distances trained (share of pairs):", *_histogram(self.coverage)]
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


def plan(recipe: Recipe) -> Plan:
    """Work out a recipe's plan.

    Raises:
        UserError: for what would stop the run, except a base or documents that the recipe says how to prepare,
            or that are on the hub: those become notes.
    """
    notes: list[str] = []
    config = _config(recipe, notes)
    begin = None if config is None else at_start(recipe)
    rows = _rows(recipe, notes) if config is not None else None
    if rows is None:
        tokens = recipe.row_tokens()
        covered = coverage([place_contiguous(Row([0] * tokens, [tokens]))], recipe.rope.window)
        notes.append("coverage is that of full contiguous rows, since the documents were not read")
    else:
        covered = rows.coverage(recipe.rope.window)
        if len(rows.rows) < recipe.rows():
            notes.append(f"{recipe.rows()} rows are read but the documents give {len(rows.rows)}: some are read again")
    if covered.untrained > 0:
        notes.append(
            f"WARNING: {covered.untrained:.0%} of the target window's distances are never trained; use longer rows "
            "(data.row_tokens), data.packing: long, or longer documents"
        )
    if recipe.data.positions == "skip":
        notes.append("WARNING: skip rows are an experiment: with frozen weights they favour local text (README)")
    target = None if begin is None else _target(recipe, begin, notes)
    start, numbers = (None, None) if begin is None else (begin.start, begin.count())
    cost = None if config is None else estimate_cost(recipe, config, sum((numbers or {}).values()))
    return Plan(recipe, start, numbers, cost, rows, covered, notes, target)


def _target(recipe: Recipe, begin: TunableRotary, notes: list[str]) -> Target:
    """The stacks to be served; raises if one of those asked for cannot be."""
    target = Target.of_recipe(recipe)
    settle(begin.learned(), target)
    notes += [f"not served: {name} {reason}" for name, reason in (target.left_out or {}).items()]
    return target


def _numbers_text(recipe: Recipe, numbers: dict[str, int]) -> str:
    """How many numbers are learned, and of which kinds."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers.items())
    rung = "" if recipe.rope.temperature == "global" else f", temperature {recipe.rope.temperature}"
    return f"{sum(numbers.values())} numbers ({recipe.rope.learn}{rung}: {kinds})"


def _config(recipe: Recipe, notes: list[str]) -> PreTrainedConfig | None:
    """The base's config if it is on this machine."""
    try:
        return load_config(recipe.base.model, recipe.base.revision, local_only=True)
    except UserError:
        if is_hub_id(recipe.base.model):
            notes.append(f"{recipe.base.model} is not in the local hub cache, so cost and documents are not read")
        elif recipe.base.prepare:
            notes.append(f"the base is not here yet: run `{recipe.base.prepare}`")
        else:
            raise
        return None


def _rows(recipe: Recipe, notes: list[str]) -> RowSet | None:
    """The run's rows if all documents are on this machine."""
    if any(name.startswith("hub:") for name in recipe.data.train):
        notes.append("documents are streamed from the hub, so they are not read for a plan")
        return None
    if missing_files(recipe) and recipe.data.prepare:
        notes.append(f"documents are not here yet: run `{recipe.data.prepare}`")
        return None
    return build_rows(recipe, load_tokenizer(recipe.base.model, recipe.base.revision))


def estimate_cost(recipe: Recipe, config: PreTrainedConfig, numbers: int = 1) -> Cost:
    """Floating-point operations and memory of a step, the mean over steps; see the module docstring."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = model.num_parameters()
    embedding = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    layers, width = config.num_hidden_layers, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads_width = config.num_attention_heads * head_dim

    def forward(tokens: int, before: int = 0) -> float:
        """Of `tokens` tokens that see `before` more."""
        seen = tokens * (before + tokens / 2)
        return float(2 * (parameters - embedding) * tokens + 4 * layers * heads_width * seen)

    train, row_tokens = recipe.train, recipe.row_tokens()
    native = recipe.rope.native or config.max_position_embeddings
    lengths = [recipe.data.length_at(step, train.steps) or row_tokens for step in range(train.steps)]
    flops = sum(row_flops(recipe, length, native, forward, numbers) * (row_tokens // length) for length in lengths)
    size = 2 if recipe.base.dtype == "bfloat16" else 4
    inner = getattr(config, "intermediate_size", None) or 4 * width
    micro = train.micro_rows * (train.tail or row_tokens)
    layer = micro * (8 * width + 4 * heads_width + 3 * inner) * size
    kept = layers * micro * width * size if train.gradient_checkpointing else layers * layer
    kept = 0 if train.gradient == "forward" else kept
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    # Keys and values of the prefix, and joined to the tail's once more.
    cache = 0 if train.tail is None else 2 * 2 * layers * kv_heads * head_dim * train.micro_rows * row_tokens * size
    logits = 3 * CHUNK * config.vocab_size * 4
    return Cost(
        parameters,
        flops * train.batch_rows / train.steps,
        parameters * size / 2**30,
        (kept + layer + cache + logits) / 2**30,
    )


def row_flops(recipe: Recipe, length: int, native: int, forward: Callable[[int, int], float], numbers: int) -> float:
    """A row of `length` tokens: what is read for a gradient, and what the base is asked."""
    train = recipe.train
    tail = train.tail if train.tail is not None and train.tail < length else length
    read = forward(length - tail, 0) if tail < length else 0.0
    asked = 0.0
    lesson = Lesson.of(recipe, native)
    if lesson.taught:
        slid = lesson.objective != "next-token"
        asked = forward(min(native, length), 0) * (
            len(windows(length, native, lesson.stride, tail)) if slid else length - tail < native
        )
    if train.gradient == "forward":
        probes = numbers if numbers <= ONE_BY_ONE else train.probes
        return (2 * probes + 1) * (read + forward(tail, length - tail) + asked)
    passes = 3 if train.gradient_checkpointing else 2
    return read + passes * forward(tail, length - tail) + asked


def _rows_text(rows: RowSet) -> str:
    if rows.packed is None:
        return f"{len(rows.rows)} skip rows drawn from the documents"
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
