"""The sections of a recipe: frozen dataclasses with every default and every range.

The sections for the steps after training, `eval` and `export`, are in `results_schema.py`.

Units: lengths and positions are in tokens; learning rates are per step, in log space (a rate of 0.01 moves a
number by about 1% per step). Ranges are annotations, explained in `ranges.py`.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .ranges import Above, AtLeast, AtMost, Below, Count, Files, FolderName, Length, NotEmpty, Rate, Share, Weight
from .results_schema import Eval, Export, TaskName


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model to extend."""

    model: str
    """A local checkpoint folder (`~` is the home folder), or a hub id (`org/name`)."""
    revision: str | None = None
    """Hub revision; pin a commit for repeatable results."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the frozen weights and the activations. Learned numbers are always float32."""
    prepare: str | None = None
    """The command that creates a local `model` folder, shown when the folder does not exist."""

    def __post_init__(self) -> None:
        if isinstance(self.model, str):  # other values are refused after this
            object.__setattr__(self, "model", os.path.expanduser(self.model))


YARN = "yarn"
METHODS = {
    YARN: "YaRN",
    "ntk-by-parts": "NTK-by-parts",
    "linear": "position interpolation",
    "ntk": "NTK-aware scaling",
    "llama3": "Llama 3.1's rule",
    "abf": "ABF",
    "cope": "CoPE",
}
"""Values of `rope.init` that name a search-free method to start from, and the names of these methods."""
RAMPED = (YARN, "ntk-by-parts")
"""The methods whose table is a YaRN ramp, which `scale` and `ramp` can start from."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The numbers to learn, and the window to learn them for."""

    window: Length
    """Window to serve after tuning."""
    native: Length | None = None
    """Window that the base was trained with; null: `max_position_embeddings` of its config."""
    factor: Annotated[float, AtLeast(1), "a smaller factor would shrink the window"] | None = None
    """YaRN's scale at the start; null: window / native."""
    frequencies: Literal["fixed", "scale", "ramp", "per_pair"] = "per_pair"
    """Learned parameters of the frequency table. fixed: none; the table and the temperature t stay those of search-free
    YaRN, so that query gains or LoRA are learned alone, for which rows of half the window suffice. scale: s and t.
    ramp: s, t, beta_fast and beta_slow. per_pair: one factor per rotary pair, and t."""
    query_gains: Literal["none", "layer", "head", "pair", "pair_phase"] = "none"
    """Gains on the queries, folded into the query weights at export. none: only the temperature t of the whole model.
    layer, head: one gain per layer or head. pair: one per head and rotary pair. pair_phase: one gain and one angle per
    head and rotary pair."""
    qk_bias: bool = False
    """Learn offsets of queries and keys, exported as biases of their projections, where the family supports them."""
    init: Annotated[str, NotEmpty()] = YARN
    """yarn: every parameterisation starts as search-free YaRN, exactly. ntk-by-parts (YaRN without its temperature),
    linear (position interpolation), ntk, llama3, abf, cope: it starts as that method, and `train.weight_decay` and
    `train.decide` pull towards that method. Or the folder of a finished run, of a run's checkpoint, or of an adapter,
    on the same base and with the same `frequencies`, `query_gains` and `lora`: learning starts from its numbers, as
    offsets from YaRN. Change `train.seed` too, or the run reads the rows of the earlier one again."""
    beta_fast: float = 32.0
    """Rotations within the native window above which YaRN keeps a pair's frequency."""
    beta_slow: Annotated[float, Above(0)] = 1.0
    """Rotations within the native window below which YaRN divides a pair's frequency by the whole factor."""

    @property
    def method(self) -> str:
        """The search-free method that learned numbers are offsets from, a key of `METHODS`."""
        return self.init if self.init in METHODS else YARN


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes of the weights, trained together with the other learned numbers and merged at export."""

    rank: Count = 8
    targets: Annotated[list[str], NotEmpty(), "name at least one module"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of linear modules."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Documents, and how rows are made from them."""

    train: Files
    """Files, folders or globs, relative to the working folder or to the recipe's; or `hub:org/name[:split]` for a
    dataset on the hub. Kinds of files: .txt .md .jsonl .ndjson .json, each also with .gz or .zst, and .parquet."""
    heldout: Files
    """Documents for measuring; never trained on."""
    heldout_unlike: list[str] = field(default_factory=list)
    """More documents for measuring, by other authors and of other genres than those of `train`: a gain on `heldout`
    alone may be adaptation to a style. Empty: not measured."""
    validation: Annotated[list[str], NotEmpty(), "name a file, or null"] | None = None
    """Documents that `train.decide` measures on, never trained on; null: some documents of `train` are held back."""
    prepare: str | None = None
    """The command that creates the files, shown when they do not exist."""
    text_key: str = "text"
    """Field that holds the text. A field `input_ids` with token ids is used without tokenization. If a record has
    neither, its `messages` are rendered with the chat template."""
    skip_bad_rows: bool = False
    """Skip and count rows that cannot be used, instead of refusing the file."""
    rows: Count | None = None
    """Rows to prepare; null: as many as the run reads, so that no row is read twice if the documents suffice."""
    row_tokens: Length | None = None
    """Tokens per row; null: the window."""
    packing: Literal["long", "concat"] = "long"
    """long: a row is a span of one document where documents are long enough, else several documents joined. concat:
    documents share rows, each isolated from the others, with positions from zero."""
    lengths: Annotated[list[Length], NotEmpty(), "name a length, or null"] | None = None
    """Lengths that rows are cut to, one length per step; null: rows are not cut."""
    order: Literal["mixed", "staged"] = "mixed"
    """Order of `lengths`. mixed: they alternate. staged: one after another, each for its share of the steps."""
    needles: Share = 0.0
    """Share of the rows that end in a question for a number stated earlier in the row."""
    needle_tasks: Annotated[list[TaskName], NotEmpty(), "name a task"] = field(default_factory=lambda: ["needle"])
    """Tasks of these questions, in turn; see `eval.retrieval.tasks`."""
    needle_keys: Count = 1
    """Needles per question of the task needle, each with another word; the question is about one of them."""
    wording: Literal["plain", "demo"] = "plain"
    """Wording of these questions; see `eval.retrieval.wording`."""

    def heldout_files(self) -> dict[str, list[str]]:
        """Recipe key -> files, of all documents for measuring."""
        return {"data.heldout": self.heldout, "data.heldout_unlike": self.heldout_unlike}

    def named_files(self) -> list[str]:
        """All documents that the recipe names."""
        return [*self.train, *(self.validation or []), *self.heldout, *self.heldout_unlike]

    def length_at(self, step: int, steps: int) -> int | None:
        """The length that rows are cut to in a step; None if they are not cut."""
        if self.lengths is None:
            return None
        turn = step if self.order == "mixed" else step * len(self.lengths) // steps
        return self.lengths[turn % len(self.lengths)]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates, one per kind of learned number."""

    frequency: Rate = 0.02
    temperature: Rate = 0.01
    bias: Rate = 0.01
    """Relative to the RMS size of queries or keys in their layer."""
    gain: Rate | None = None
    """null: 0.01 for gains per layer, 0.02 per head, 0.03 per rotary pair."""
    phase: Rate = 0.03
    lora: Rate = 0.002
    """Rate of the factors themselves, not in log space."""


@dataclass(frozen=True, kw_only=True)
class Decays:
    """Decay towards search-free YaRN, one value per kind of learned number."""

    frequency: Weight = 0.0
    temperature: Weight = 0.0
    bias: Weight = 0.0
    gain: Weight = 0.0
    phase: Weight = 0.0
    lora: Weight = 0.0


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop."""

    steps: Count = 100
    batch_size: Count = 4
    """Rows per step, over all processes."""
    micro_batch_size: Count = 1
    """Rows per forward pass, in each process."""
    learning_rate: Rates | Rate = field(default_factory=Rates)
    warmup: Annotated[float, AtLeast(0), Below(1)] = 0.1
    """Share of the steps during which the rate rises; then it follows a cosine down to a tenth of the peak."""
    clip: Weight = 1.0
    """Largest gradient norm; 0: no clipping."""
    weight_decay: Decays | Weight = 0.0
    """Decay of every learned number towards search-free YaRN, where a gain is 1 and a phase 0. It is AdamW's: a step
    moves a number by at most rate x decay of its distance."""
    objective: Literal["next-token", "distill", "preserve"] = "next-token"
    """next-token: cross entropy. distill: KL from the base's own predictions, computed with a sliding native
    window. preserve: KL from the base's own predictions inside its native window, and nothing on the text beyond it, so
    that only answers to planted questions (`data.needles`) teach to use distant text."""
    short_context_kl: Weight = 0.0
    """Weight of KL(base || tuned) inside the native window, which preserves the predictions on short texts."""
    answer_weight: Weight = 50.0
    """Weight of each token of the answer to a planted question (`data.needles`); other tokens have weight 1."""
    seed: Annotated[int, AtLeast(0), Below(2**32)] = 0
    gradient_checkpointing: bool = True
    keep_attention: bool = False
    """Keep the output of attention as well as the inputs of checkpointed layers, so that it is not computed again."""
    offload_activations: bool = False
    """Keep the inputs of checkpointed layers in CPU memory."""
    tiled_mlp: Count | None = None
    """Tokens per tile of the MLPs; null: whole rows. Saves memory at the cost of one more forward pass of the MLPs."""
    decide: bool = False
    """At the end, keep the state with the lowest loss on validation rows (`data.validation`): the final or the averaged
    numbers, their offsets from the start (search-free YaRN) multiplied by 1, 0.75, 0.5, 0.25 or 0, or the numbers of a
    checkpoint before the last one."""
    checkpoint_every: Count = 10
    """Steps between saved states; an interrupted run loses at most this many."""
    keep_checkpoints: Annotated[int, AtLeast(2)] = 3

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss compares with the base's own predictions."""
        return self.objective != "next-token" or self.short_context_kl > 0


STAGES = "stages 1 and 2 shard gradients and optimizer state, which are small here: the base is frozen"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Processes and logs."""

    processes: Count | None = None
    """Required number of processes; any other number is an error. null: any number."""
    zero: Annotated[Literal[0, 3], STAGES] = 0
    """3: frozen weights sharded over the processes by DeepSpeed. 0: whole in each process."""
    fsdp: bool = False
    """Frozen weights sharded by torch's FSDP2, instead of `zero: 3`."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: shards are kept in CPU memory."""
    sequence: Count = 1
    """Processes that share each row (DeepSpeed's Ulysses), for rows whose activations do not fit one device."""
    timeout_minutes: Annotated[float, Above(0), AtMost(10080), "a week is 10080"] = 30.0
    """Timeout of communication between processes; set it above the time of the slowest step."""
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    threads: Count | None = None
    """CPU threads per process; null: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `name` is the name of its folder under `runs/`."""

    name: Annotated[str, FolderName()]
    base: Base
    rope: Rope
    data: Data
    lora: Lora | None = None
    """null: the weights do not change."""
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    export: Export = field(default_factory=Export)
    runtime: Runtime = field(default_factory=Runtime)

    def row_tokens(self) -> int:
        """Tokens per row, with the default filled in."""
        return self.data.row_tokens or self.rope.window

    def rows(self) -> int:
        """Rows to prepare, with the default filled in."""
        return self.data.rows or self.train.steps * self.train.batch_size

    def sharded(self) -> bool:
        """Whether frozen weights are sharded over the processes."""
        return self.runtime.zero == 3 or self.runtime.fsdp

    def to_dict(self) -> dict[str, Any]:
        """All values including defaults, ready for YAML."""
        return dataclasses.asdict(self)
