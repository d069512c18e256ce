"""The recipe sections for the steps after training: `eval` and `export`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .ranges import Above, Count, Length, NotEmpty, Share

TaskName = Literal["needle", "values", "variables", "words"]


@dataclass(frozen=True, kw_only=True)
class Retrieve:
    """Retrieval of numbers that are hidden in the held-out documents."""

    lengths: Annotated[list[Length], NotEmpty(), "name a length, or null"] | None = None
    """Lengths of the prompts; null: the native window doubled up to the window, each minus 16 tokens for the answer."""
    depths: Annotated[list[Share], NotEmpty(), "name a depth"] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0]
    )
    """Position of the needle: 0 far from the question, 1 right before it."""
    per_cell: Count = 4
    """Prompts per length and depth."""
    tasks: Annotated[list[TaskName], NotEmpty(), "name a task"] = field(default_factory=lambda: ["needle"])
    """needle: a number that is stated once. values: all three numbers of one word. variables: all variables with one
    value, through assignments. words: the most frequent of four words."""
    keys: Count = 1
    """Needles per prompt, each with another word; the question is about one of them."""
    wording: Literal["plain", "demo"] = "plain"
    """demo: the wording that data/tiny-base was trained on."""


MethodName = Literal["linear", "ntk", "dynamic", "ntk-by-parts", "llama3", "abf", "cope"]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Settings of `compare`, which measures on the held-out documents."""

    methods: list[MethodName] = field(default_factory=lambda: ["linear", "ntk", "dynamic"])
    """Search-free methods to measure besides the base, the base with a sliding native window, and YaRN."""
    native_adapted: bool = False
    """Train a control: the same kinds of numbers except frequencies, learned from the same rows cut to the native
    window, and measured with a sliding native window. An improvement that the control has too is adaptation to the
    text, not a longer reach. Costs a second training."""

    lengths: Annotated[list[Length], NotEmpty(), "name a length, or null"] | None = None
    """Lengths of the excerpts; null: native window and window."""
    documents: Count = 4
    """Excerpts per length, taken from the documents in turn."""
    buckets: Count = 8
    """Position buckets per window."""
    stride: Count | None = None
    """Stride of the sliding native window; null: a quarter of the native window."""
    chunk: Count | None = None
    """Tokens per forward pass over a KV cache, for documents too long for one pass; null: the whole document."""
    key_gain: Annotated[float, Above(0)] = 2.0
    """Least reduction of the NLL of a key token by far context, in nats (threshold of LongPPL)."""
    key_floor: Annotated[float, Above(0)] = 2.0
    """Largest NLL of a key token with far context, in nats (threshold of LongPPL)."""
    retrieval: Retrieve | None = None
    """null: retrieval is not measured."""

    def stride_over(self, native: int) -> int:
        """The stride of a native window of so many tokens."""
        return self.stride or max(1, native // 4)


StackName = Literal[
    "transformers", "transformers-4.57", "transformers-4.55", "transformers-4.50", "vllm", "vllm-0.29", "vllm-0.19",
    "vllm-0.11",
    "sglang", "lmdeploy", "turbomind", "turbomind-0.13", "tgi", "llama.cpp", "mlx-lm", "tensorrt-llm", "exllamav2",
    "exllamav3", "onnx-genai", "ctranslate2", "openvino",
]  # fmt: skip
"""The serving stacks of `serving.stacks`, which lists the versions that each name covers."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The checkpoint to serve."""

    stacks: Annotated[list[StackName], NotEmpty(), "name a stack, or null"] | None = None
    """Serving stacks that must apply all learned numbers; null: the common stacks that run this family."""
    fold: Literal["auto", "never", "always"] = "auto"
    """Multiply the temperature into the query projections; auto: where these change anyway, or where a stack needs
    it."""
    as_llama: bool = False
    """Write a Mistral without a sliding window as LlamaForCausalLM: the same computation with the same tensors, in a
    class whose projections can have biases (`rope.qk_bias`)."""
    tolerance: Annotated[float, Above(0)] = 1e-4
    """Largest difference of a float32 logit between the tuned model and the reloaded export."""
