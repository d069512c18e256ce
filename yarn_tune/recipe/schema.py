"""A recipe's sections: frozen dataclasses with every default, here and nowhere else.

Units: lengths and positions are in tokens; learning rates are per step, in log space (a rate of 0.01 moves a
number by about 1% a step).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


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


YARN = "yarn"
"""`rope.init` where a run starts as search-free YaRN, exactly."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """What is learned, and for which window."""

    window: int
    """Window to be served after tuning."""
    native: int | None = None
    """Window the base was trained with; null: its config's `max_position_embeddings`."""
    factor: float | None = None
    """YaRN's scale at the start; null: window / native."""
    frequencies: Literal["fixed", "scale", "ramp", "per_pair"] = "per_pair"
    """yarn: nothing, the table and t stay search-free YaRN's (for `temperature` or `lora` alone, which short rows can
    teach). scale: s and t. ramp: also beta_fast and beta_slow. frequency: one factor per rotary pair, and t."""
    query_gains: Literal["none", "layer", "head", "pair", "pair_phase"] = "none"
    """global: one attention temperature for the whole model. On top of it, folded into the queries: layer, head: one
    gain each; spectral: one a head and rotary pair; phase: that, and one angle each."""
    init: str = YARN
    """yarn: every parameterisation starts as search-free YaRN, exactly. Or the folder of a finished run, of a run's
    checkpoint, or of an adapter, on the same base, with the same `frequencies`, `query_gains` and `lora`: what it
    learned is the start, and `train.weight_decay` pulls to YaRN still. Take another `train.seed`, or the rows may be
    those it read."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes of the weights, trained beside the learned numbers and merged at export."""

    rank: int = 8
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of linear modules."""


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
    lengths: list[int] | None = None
    """Lengths that rows are cut to, one for each step; null: rows are read whole."""
    order: Literal["mixed", "staged"] = "mixed"
    """Of `lengths`. mixed: they take turns. staged: one after another, each for its share of the steps."""
    needles: float = 0.0
    """Share of the rows that end in a question for a number stated somewhere in them."""
    wording: Literal["plain", "demo"] = "plain"
    """Of those questions; see `eval.retrieval.wording`."""

    def length_at(self, step: int, steps: int) -> int | None:
        """What rows are cut to in a step; None where they are read whole."""
        if self.lengths is None:
            return None
        turn = step if self.order == "mixed" else step * len(self.lengths) // steps
        return self.lengths[turn % len(self.lengths)]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates, one per kind of learned number."""

    frequency: float = 0.02
    temperature: float = 0.01
    gain: float | None = None
    """null: 0.01 for a gain a layer, 0.02 a head, 0.03 a rotary pair: what moves more must move slower."""
    phase: float = 0.03
    lora: float = 0.002
    """Of the factors themselves, not in log space."""


@dataclass(frozen=True, kw_only=True)
class Decays:
    """Pulls towards search-free YaRN, one per kind of learned number."""

    frequency: float = 0.0
    temperature: float = 0.0
    gain: float = 0.0
    phase: float = 0.0
    lora: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int = 100
    batch_size: int = 4
    """Rows a step, over all processes."""
    micro_batch_size: int = 1
    """Rows a forward pass, in each process."""
    learning_rate: Rates | float = field(default_factory=Rates)
    warmup: float = 0.1
    """Share of the steps during which the rate rises; then a cosine down to a tenth of the peak."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    weight_decay: Decays | float = 0.0
    """Pull of every learned number towards search-free YaRN, where a gain is 1 and a phase 0; AdamW's, so a step moves
    a number by at most rate x decay of its distance."""
    objective: Literal["next-token", "distill"] = "next-token"
    """distill: the base's own predictions from its native window, slid along the row."""
    short_context_kl: float = 0.0
    """Weight of KL(base || tuned) inside the native window: keeps short texts as they were."""
    answer_weight: float = 50.0
    """Of each token of the answer to a planted question (`data.needles`); other tokens count 1."""
    seed: int = 0
    gradient_checkpointing: bool = True
    keep_attention: bool = False
    """What attention gave is kept beside the inputs of checkpointed layers, and not computed again."""
    offload_activations: bool = False
    """The inputs of checkpointed layers wait in the CPU's memory."""
    tiled_mlp: int | None = None
    """Tokens of a row that pass an MLP at a time; null: all. Less memory a layer, for one more forward of its MLP."""
    checkpoint_every: int = 10
    """Steps between saved states; an interrupted run loses at most this many."""
    keep_checkpoints: int = 3

    def rates(self, query_gains: str = "none") -> Rates:
        """All rates, also when the recipe gives one number; by `rope.query_gains`."""
        if isinstance(self.learning_rate, Rates):
            own = self.learning_rate.gain
            by_rung = {"layer": 0.01, "head": 0.02}.get(query_gains, 0.03)
            return dataclasses.replace(self.learning_rate, gain=by_rung if own is None else own)
        rate = self.learning_rate
        return Rates(frequency=rate, temperature=rate, gain=rate, phase=rate, lora=rate)

    def decays(self) -> Decays:
        """All decays, also when the recipe gives one number."""
        if isinstance(self.weight_decay, Decays):
            return self.weight_decay
        decay = self.weight_decay
        return Decays(frequency=decay, temperature=decay, gain=decay, phase=decay, lora=decay)


@dataclass(frozen=True, kw_only=True)
class Retrieve:
    """Numbers hidden in the held-out documents, to be found again."""

    lengths: list[int] | None = None
    """Of the prompts; null: the native window doubled up to the window, each less 16 tokens for the answer."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the needle is: 0 far from the question, 1 right before it."""
    per_cell: int = 4
    """Prompts for each length and depth."""
    keys: int = 1
    """Needles a prompt, each for another word; one is asked for."""
    wording: Literal["plain", "demo"] = "plain"
    """demo: as data/tiny-base was trained to read it."""


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
    chunk: int | None = None
    """Tokens a forward pass over a KV cache, for documents too long for one; null: the whole document."""
    key_gain: float = 2.0
    """A key token is one that far context predicts better by at least so many nats ..."""
    key_floor: float = 2.0
    """... and in at most so many (LongPPL's thresholds)."""
    retrieval: Retrieve | None = None
    """null: no needles are asked for."""


StackName = Literal[
    "transformers", "transformers-4.57", "transformers-4.55", "transformers-4.50", "vllm", "vllm-0.29", "vllm-0.11",
    "sglang", "lmdeploy", "turbomind", "turbomind-0.13", "tgi", "llama.cpp", "mlx-lm", "tensorrt-llm", "exllamav2",
    "exllamav3", "onnx-genai", "ctranslate2", "openvino",
]  # fmt: skip
"""As `serving.stacks` lists them, with the versions each stands for."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The checkpoint to be served."""

    stacks: list[StackName] | None = None
    """Serving stacks that must compute what was learned; null: the usual ones that run this family."""
    fold: Literal["auto", "never", "always"] = "auto"
    """Multiply the temperature into the query projections: auto only where a stack needs it."""
    tolerance: float = 1e-4
    """Largest difference of a float32 logit between the tuned model and the reloaded export."""


STAGES = "stages 1 and 2 shard optimizer state and gradients, here of a few thousand numbers, so they are not offered"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Processes and logs."""

    processes: int | None = None
    """Processes the run is meant for; another world size is refused. null: any."""
    zero: Annotated[Literal[0, 3], STAGES] = 0
    """3: frozen weights in shards over the processes, by DeepSpeed. 0: whole in each."""
    fsdp: bool = False
    """Frozen weights in shards by torch's FSDP2, instead of `zero: 3`."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: shards wait in the CPU's memory."""
    sequence: int = 1
    """Processes that share each row (DeepSpeed's Ulysses), for rows whose activations do not fit one device."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up; more than the slowest step takes."""
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
    lora: Lora | None = None
    """null: the weights stay as they are."""
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    export: Export = field(default_factory=Export)
    runtime: Runtime = field(default_factory=Runtime)

    def row_tokens(self) -> int:
        """Tokens a row, the default filled in."""
        return self.data.row_tokens or self.rope.window

    def rows(self) -> int:
        """Rows to prepare, the default filled in."""
        return self.data.rows or self.train.steps * self.train.batch_size

    def sharded(self) -> bool:
        """Whether frozen weights are split over the processes."""
        return self.runtime.zero == 3 or self.runtime.fsdp

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults written out, ready for YAML."""
        return dataclasses.asdict(self)
