"""A run, written down: frozen dataclasses read from YAML plus dotted overrides.

Every problem of a recipe is reported at once, each with its place (file and key), the value found and what to
write instead. Precedence: defaults < YAML < overrides (`train.steps=50`). Defaults live here and nowhere else.

Units: lengths and positions are in tokens; learning rates are per step, in log space (a rate of 0.01 moves a
number by about 1% a step).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError
from .schema import apply_override, build, show


class RecipeError(UserError):
    """The user's recipe cannot be run as written; the message lists every problem found."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model to extend."""

    model: str
    """A local checkpoint folder, or a hub id (`org/name`)."""
    revision: str | None = None
    """Hub revision; pin a commit for results to be repeatable."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen weights and of activations. What is learned is float32 whatever stands here."""
    prepare: str | None = None
    """The command that makes a local `model` folder, shown when the folder is not there."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """What is learned, and for which window."""

    window: int
    """Window to be served after tuning."""
    native: int | None = None
    """Window the base was trained with; null: its config's `max_position_embeddings`."""
    factor: float | None = None
    """YaRN's scale at the start; null: window / native."""
    learn: Literal["scale", "ramp", "frequency"] = "frequency"
    """scale: s and t. ramp: also beta_fast and beta_slow. frequency: one factor per rotary pair, and t."""
    temperature: Literal["global"] = "global"
    """One attention temperature for the whole model."""
    init: Literal["yarn"] = "yarn"
    """Every parameterisation starts as search-free YaRN, exactly."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Data:
    """Documents, and how they become rows."""

    train: list[str]
    """Files or globs (.txt .jsonl .jsonl.gz .parquet), or `hub:org/name[:split]` for a dataset on the hub."""
    heldout: list[str]
    """Documents for measuring; never trained on."""
    prepare: str | None = None
    """The command that makes the files, shown when they are not there."""
    text_key: str = "text"
    """Field with the text; a field `input_ids` holding token ids is taken as it is."""
    rows: int | None = None
    """Rows to prepare; null: as many as the run will read, so that no row is read twice if documents suffice."""
    row_tokens: int | None = None
    """Tokens a row; null: the window."""
    packing: Literal["long", "concat"] = "long"
    """long: a row is a span of one document where documents are long enough, and joined ones otherwise.
    concat: documents share rows, each isolated from the others, with positions from zero."""
    positions: Literal["contiguous", "skip"] = "contiguous"
    """contiguous: 0, 1, 2, ... skip: a row holds spans of one document at their true positions across the
    window (an experiment: with frozen weights it is biased towards local text)."""
    spans: int = 2
    """Spans a row, for `positions: skip`."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates, one per kind of learned number."""

    frequency: float = 0.02
    temperature: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int = 100
    batch_rows: int = 4
    """Rows a step, over all processes."""
    micro_rows: int = 1
    """Rows a forward pass, in each process."""
    learning_rate: Rates | float = field(default_factory=Rates)
    warmup: float = 0.1
    """Share of the steps during which the rate rises; then a cosine down to a tenth of the peak."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    weight_decay: float = 0.0
    """Pull of every learned number towards search-free YaRN."""
    objective: Literal["next-token"] = "next-token"
    seed: int = 0
    gradient_checkpointing: bool = True
    use_reentrant: bool = False
    """Must stay false; named here because reentrant checkpointing fails with shared cos/sin."""
    checkpoint_every: int = 10
    """Steps between saved states; an interrupted run loses at most this many."""
    keep_checkpoints: int = 3

    def rates(self) -> Rates:
        """Both rates, also when the recipe gives one number."""
        if isinstance(self.learning_rate, Rates):
            return self.learning_rate
        return Rates(frequency=self.learning_rate, temperature=self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What `compare` measures on the held-out documents."""

    lengths: list[int] | None = None
    """Lengths of the excerpts; null: native window and window."""
    documents: int = 4
    """Excerpts a length; they are taken from the documents in turn."""
    buckets: int = 8
    """Position buckets a window."""
    stride: int | None = None
    """Step of the native window slid over the document; null: a quarter of it."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The checkpoint to be served."""

    stacks: list[Literal["transformers", "vllm"]] = field(default_factory=lambda: ["transformers", "vllm"])
    tolerance: float = 1e-4
    """Largest difference of a float32 logit between the tuned model and the reloaded export."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Processes and logs."""

    processes: int | None = None
    """Processes the run is meant for; another world size is refused. null: any."""
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    threads: int | None = None
    """CPU threads a process; null: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `name` is the run folder's name under `runs/`."""

    name: str
    base: Base
    rope: Rope
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    export: Export = field(default_factory=Export)
    runtime: Runtime = field(default_factory=Runtime)

    def row_tokens(self) -> int:
        """Tokens a row, the default filled in."""
        return self.data.row_tokens or self.rope.window

    def rows(self) -> int:
        """Rows to prepare, the default filled in."""
        return self.data.rows or self.train.steps * self.train.batch_rows

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults written out, ready for YAML."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; values are YAML.

    Raises:
        RecipeError: with every problem found.
    """
    source = str(path)
    if not Path(path).is_file():
        raise RecipeError(source, ["no such file; `ls recipes/` shows the recipes that come with yarn_tune"])
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(source, [f"not readable as YAML: {where}"]) from error
    if not isinstance(tree, dict):
        raise RecipeError(source, [f"a recipe is a mapping of sections, found {show(tree)}"])
    tree.setdefault("name", Path(path).stem)
    return parse_recipe(tree, overrides or [], source)


def parse_recipe(tree: dict[str, Any], overrides: list[str], source: str = "recipe") -> Recipe:
    """Build and check a recipe from nested dicts; see `load_recipe`."""
    problems: list[str] = []
    for override in overrides:
        apply_override(tree, override, problems)
    recipe = build(Recipe, tree, "", problems)
    if recipe is not None:
        problems += _impossible(recipe)
    if problems or recipe is None:
        raise RecipeError(source, problems)
    return recipe  # type: ignore[no-any-return]


Check = tuple[bool, str, Any, str]
"""(holds, place, value, remedy)"""


def _impossible(recipe: Recipe) -> list[str]:
    """Values and combinations that no run can have; what depends on the base model is checked with it."""
    checks = [
        *_rope_checks(recipe.rope),
        *_data_checks(recipe),
        *_train_checks(recipe.train),
        *_other_checks(recipe),
    ]
    return [f"{place}: {remedy}; found {show(value)}" for holds, place, value, remedy in checks if not holds]


def _rope_checks(rope: Rope) -> list[Check]:
    inside = rope.native is None or 2 <= rope.native <= rope.window
    native = f"the native window must be between 2 and rope.window ({rope.window}); this tool only extends"
    swapped = f"must exceed rope.beta_slow ({rope.beta_slow}); are the betas swapped?"
    return [
        (rope.window >= 2, "rope.window", rope.window, "a window is at least 2 tokens"),
        (inside, "rope.native", rope.native, native),
        (rope.factor is None or rope.factor >= 1, "rope.factor", rope.factor, "a factor below 1 shrinks"),
        (rope.beta_slow > 0, "rope.beta_slow", rope.beta_slow, "must be positive"),
        (rope.beta_fast > rope.beta_slow, "rope.beta_fast", rope.beta_fast, swapped),
    ]


def _data_checks(recipe: Recipe) -> list[Check]:
    data, row_tokens = recipe.data, recipe.row_tokens()
    both = sorted(set(data.train) & set(data.heldout))
    skip = data.positions == "skip"
    spans = f"a skip row holds between 2 and row_tokens / 2 ({row_tokens // 2}) spans"
    return [
        (bool(data.train), "data.train", data.train, "no documents; name at least one file"),
        (bool(data.heldout), "data.heldout", data.heldout, "no documents to measure on; name at least one"),
        (not both, "data.heldout", both, "stands in data.train too; measuring on training documents says nothing"),
        (data.rows is None or data.rows >= 1, "data.rows", data.rows, "at least 1, or null"),
        (row_tokens >= 2, "data.row_tokens", data.row_tokens, "at least 2"),
        (
            row_tokens <= recipe.rope.window,
            "data.row_tokens",
            data.row_tokens,
            f"a row cannot be longer than rope.window ({recipe.rope.window})",
        ),
        (
            not skip or data.packing == "long",
            "data.positions",
            data.positions,
            "skip rows are cut from single documents: set data.packing to long",
        ),
        (not skip or 2 <= data.spans <= row_tokens // 2, "data.spans", data.spans, spans),
    ]


def _train_checks(train: Train) -> list[Check]:
    rates = train.rates()
    micro = train.micro_rows >= 1 and train.batch_rows % max(train.micro_rows, 1) == 0
    reentrant = "reentrant checkpointing fails when layers share cos and sin; remove the key or set it to false"
    return [
        (train.steps >= 1, "train.steps", train.steps, "at least 1"),
        (train.batch_rows >= 1, "train.batch_rows", train.batch_rows, "at least 1"),
        (micro, "train.micro_rows", train.micro_rows, f"must divide train.batch_rows ({train.batch_rows})"),
        (rates.frequency > 0, "train.learning_rate.frequency", rates.frequency, "must be positive"),
        (rates.temperature > 0, "train.learning_rate.temperature", rates.temperature, "must be positive"),
        (0 <= train.warmup < 1, "train.warmup", train.warmup, "a share of the steps, from 0 to below 1"),
        (train.clip >= 0, "train.clip", train.clip, "a gradient norm, or 0 for none"),
        (train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "must not be negative"),
        (not train.use_reentrant, "train.use_reentrant", train.use_reentrant, reentrant),
        (train.checkpoint_every >= 1, "train.checkpoint_every", train.checkpoint_every, "at least 1"),
        (train.keep_checkpoints >= 2, "train.keep_checkpoints", train.keep_checkpoints, "at least 2"),
    ]


def _other_checks(recipe: Recipe) -> list[Check]:
    evaluation, runtime, name = recipe.eval, recipe.runtime, recipe.name
    window = recipe.rope.window
    fits = all(2 <= length <= window for length in evaluation.lengths or [])
    folder = bool(name) and "/" not in name and name not in (".", "..")
    return [
        (fits, "eval.lengths", evaluation.lengths, f"lengths from 2 to rope.window ({window})"),
        (evaluation.lengths != [], "eval.lengths", evaluation.lengths, "name a length, or null"),
        (evaluation.documents >= 1, "eval.documents", evaluation.documents, "at least 1"),
        (evaluation.buckets >= 1, "eval.buckets", evaluation.buckets, "at least 1"),
        (evaluation.stride is None or evaluation.stride >= 1, "eval.stride", evaluation.stride, "at least 1"),
        (bool(recipe.export.stacks), "export.stacks", recipe.export.stacks, "name at least one stack"),
        (recipe.export.tolerance > 0, "export.tolerance", recipe.export.tolerance, "must be positive"),
        (
            runtime.processes is None or runtime.processes >= 1,
            "runtime.processes",
            runtime.processes,
            "at least 1",
        ),
        (runtime.threads is None or runtime.threads >= 1, "runtime.threads", runtime.threads, "at least 1"),
        (folder, "name", name, "a plain folder name"),
    ]
