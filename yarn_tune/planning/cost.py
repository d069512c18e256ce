"""What a step costs: floating-point operations, and peak memory counted tensor by tensor.

Time. A forward is 2 x parameters x tokens operations, and 4 x layers x width x tokens^2 / 2 of (causal) attention. With
frozen weights a backward pass computes gradients of activations alone: as many again for the matrices, and 2.5 times as
many for attention, whose kernel has five products there for two. Checkpointing computes the forward once more, without
attention where that is kept; tiled MLPs are computed once more still. The base is asked in one forward a window.

Memory is what is held at the worst moment, counted as torch holds it for a pre-norm decoder with a gated MLP, whose
frozen matrices need no input for their gradients. `benchmarks/memory.py` measures it; the prediction is within 20%.
Other layouts of a layer (experts, parallel attention) are counted as if they were this one.

Shapes, in numbers a token: H hidden, Q queries, K keys (as many values), M inner width of the MLP; e bytes a number.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..models import CHUNK, GIB, has_sliding_layers, head_dim_of, rope_facts
from ..recipe import Recipe
from ..training import ObjectiveConfig, windows
from ..tunable import NO_LORA, LoraSize, kinds_of

BACK = 2.5
"""Operations of attention's backward pass, in those of its forward."""
STATE = 16
"""Bytes a learned number: value, gradient and two moments, in float32."""
LIVE = 10**9
"""Parameters, DeepSpeed's `stage3_max_live_parameters`."""
GPUS = (24, 40, 80)
RESERVE = 0.08
"""Share of a GPU that is not counted on: the CUDA context, libraries' workspaces, fragments."""


@dataclass(frozen=True)
class Forward:
    """Operations of reading tokens."""

    dense: float
    """A token, in matrices."""
    attention: float
    """A pair of tokens."""
    mlp: float
    """A token, in the matrices of gated MLPs."""

    def __call__(self, tokens: int, dense: float = 1.0, attention: float = 1.0) -> float:
        """Of a row of `tokens` tokens; so many times over in matrices, and in attention."""
        return dense * self.dense * tokens + attention * self.attention * tokens * tokens / 2


@dataclass(frozen=True)
class Cost:
    """Figures of one step in one process."""

    parameters: int
    step_flops: float
    weights_gib: float
    activations_gib: float
    forward: Forward


@dataclass(frozen=True)
class Shape:
    """The numbers of the module docstring, for one model."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    rotary: int
    vocabulary: int
    copied: int
    """What LoRA keeps of its modules' inputs in a layer, below float32; in the mean over layers."""
    shared: int
    """And in float32."""

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoraSize = NO_LORA) -> "Shape":
        """Of a model by its config."""
        heads, width = config.num_attention_heads, config.hidden_size
        head_dim = head_dim_of(config)
        return cls(
            layers=config.num_hidden_layers,
            hidden=width,
            queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            inner=getattr(config, "intermediate_size", None) or 4 * width,
            rotary=head_dim,
            vocabulary=config.vocab_size,
            copied=lora.copied // config.num_hidden_layers,
            shared=lora.shared // config.num_hidden_layers,
        )


def estimate_cost(
    recipe: Recipe, config: PreTrainedConfig, numbers: int = 1, lora: LoraSize = NO_LORA, native: int | None = None
) -> Cost:
    """Operations of a step, the mean over steps, and the peak of memory.

    Args:
        recipe: of the run.
        config: of the base's language model.
        numbers: learned ones, without LoRA's.
        lora: size of the LoRA section.
        native: the base's window, if it is known already; else it is read from `recipe` or `config`.
    """
    numbers += lora.numbers
    parameters, embedding = _parameters(config)
    shape = Shape.of(config)
    mlp = 6.0 * shape.layers * shape.hidden * shape.inner
    forward = Forward(2.0 * (parameters - embedding), 4.0 * shape.layers * shape.queries, mlp)
    train, row_tokens = recipe.train, recipe.row_tokens()
    native = native or _native(recipe, config)
    lengths = [recipe.data.length_at(step, train.steps) or row_tokens for step in range(train.steps)]
    flops = sum(row_flops(recipe, length, native, forward) * (row_tokens // length) for length in lengths)
    return Cost(
        parameters,
        flops * train.batch_size / train.steps,
        _weights(recipe, config, parameters, embedding, numbers) / GIB,
        step_memory(recipe, config, row_tokens, lora, native) / GIB,
        forward,
    )


def row_flops(recipe: Recipe, length: int, native: int, forward: Forward) -> float:
    """A row of `length` tokens: what is read for a gradient, and what the base is asked."""
    train = recipe.train
    asked = 0.0
    config = ObjectiveConfig.of(recipe.train, native)
    if config.base_reads != "nothing":
        slid = config.base_reads == "slid"
        asked = forward(min(native, length)) * (len(windows(length, native, config.stride)) if slid else 1)
    again = train.gradient_checkpointing
    attention = 1 + BACK + (again and not train.keep_attention)
    dense = 2 + again + (forward.mlp / forward.dense if train.tiled_mlp is not None else 0.0)
    return forward(length, dense=dense, attention=attention) + asked


def weight_memory(recipe: Recipe, config: PreTrainedConfig, numbers: int = 1) -> float:
    """Bytes of the frozen weights in one process, and of what is learned."""
    return _weights(recipe, config, *_parameters(config), numbers)


def _weights(recipe: Recipe, config: PreTrainedConfig, parameters: int, embedding: int, numbers: int) -> float:
    e = _size(recipe)
    whole = parameters * e
    shards = recipe.runtime.processes or 1
    if recipe.sharded() and shards > 1:
        # Its shard, and whole the layer in use, the one that is fetched meanwhile, and the vocabulary matrix. DeepSpeed
        # does not let go before so many are there.
        layer = (parameters - 2 * embedding) * e / config.num_hidden_layers
        live = max(2 * layer, LIVE * e) if recipe.runtime.zero == 3 else 2 * layer
        own = 0.0 if recipe.runtime.offload == "cpu" else whole / shards
        whole = min(whole, own + live + config.vocab_size * config.hidden_size * e)
    return whole + numbers * STATE


def _native(recipe: Recipe, config: PreTrainedConfig) -> int:
    return recipe.rope.native or rope_facts(config).native


def step_memory(
    recipe: Recipe, config: PreTrainedConfig, row_tokens: int, lora: LoraSize = NO_LORA, native: int | None = None
) -> float:
    """Bytes of activations at the worst moment of a step with rows of so many tokens."""
    shape, train = Shape.of(config, lora), recipe.train
    e = _size(recipe)
    rows = train.micro_batch_size
    tokens = rows * row_tokens / recipe.runtime.sequence
    logits = 3 * CHUNK * shape.vocabulary * 4
    reading = tokens * _reading(shape, e)
    if recipe.data.packing == "concat" or has_sliding_layers(config):
        # Attention that leaves tokens out takes a mask of the whole row, of truth values and of numbers.
        logits += rows * row_tokens**2 * (1 + e)
        reading += rows * row_tokens**2 * (1 + e)
    kept, worst = _training(recipe, shape, e, tokens)
    native = native or _native(recipe, config)
    aim = ObjectiveConfig.of(recipe.train, native)
    if aim.base_reads != "nothing":
        # The base is asked while all that was kept of the model is held; its states then wait for the backward pass.
        asked = reading if aim.base_reads == "slid" else rows * min(native, row_tokens) * _reading(shape, e)
        states = tokens * shape.hidden * e
        kept, worst = kept + states, max(kept + asked, worst + states)
    return max(worst, kept + logits)


def _reading(shape: Shape, e: int) -> float:
    """Bytes a token of a pass without gradients, in the MLP of a layer."""
    # The embedding, the layer's input, the sum after attention, that sum normed; activation, other half and product.
    return (4 * shape.hidden + 3 * shape.inner) * e + 2 * shape.rotary * e


def _training(recipe: Recipe, shape: Shape, e: int, tokens: float) -> tuple[float, float]:
    """Bytes kept between the passes, and held at the worst moment of the backward pass."""
    h, q, k, m = shape.hidden, shape.queries, shape.keys, shape.inner
    norm = h * 4 if e == 2 else 0  # norms compute in float32, of a copy
    attention = (
        sum(kind.kept_queries for kind in kinds_of(recipe.rope)) * q * e
    )  # queries, for gradients of numbers on them
    attention += (2 * q + 2 * k) * e  # queries and keys, and their halves exchanged: for cos and sin
    attention += (2 * q + 2 * k) * e + norm  # turned queries and keys, values and output: for attention
    attention += 4 * (shape.shared if e == 4 else shape.copied)  # what adapters read, for the gradients of their A
    tile = recipe.train.tiled_mlp
    mlp = (h if tile else 3 * m) * e + h * e + norm  # gate, activation and other half, of the sum after attention
    layer = attention + mlp
    # With checkpointing only the layers' inputs are kept, and these may wait elsewhere.
    inputs = 0.0 if recipe.train.offload_activations else shape.layers * h * e
    if recipe.train.keep_attention:
        inputs += shape.layers * (q * e + q / shape.rotary * 4)  # its output, and in float32 a logarithm a head
    kept = inputs if recipe.train.gradient_checkpointing else inputs + shape.layers * layer
    again = layer if recipe.train.gradient_checkpointing else 0.0
    outside = (h + 4 * shape.rotary) * e
    held = kept + again + outside
    if not tile:
        # And gradients: of the layer's output, of the MLP's product and of both its factors.
        return tokens * (kept + outside), tokens * (held + (h + 3 * m) * e)
    # The worst is in the MLP's tiles, in the norm before it (float32), or in attention.
    part = recipe.train.micro_batch_size * tile * (h + 6 * m) * e
    in_norm, in_attention = h * e + 3 * h * 4, (2 * h + 2 * q + 2 * k) * e
    worst = max(tokens * (held + 2 * h * e) + part, tokens * (held - mlp + max(in_norm + norm + h * e, in_attention)))
    return tokens * (kept + outside), worst


def largest_rows(
    recipe: Recipe, config: PreTrainedConfig, weights: float, lora: LoraSize = NO_LORA, native: int | None = None
) -> dict[int, int]:
    """GPU memory in GiB -> tokens of the longest row that fits beside the weights (bytes), a multiple of 1024.

    0 where not even 1024 tokens fit.
    """

    def fits(gib: int, tokens: int) -> bool:
        return weights + step_memory(recipe, config, tokens, lora, native) <= (1 - RESERVE) * gib * GIB

    found = {}
    for gib in GPUS:
        low, high = 0, 2**14  # in 1024 tokens: fits, does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(gib, 1024 * middle) else (low, middle)
        found[gib] = 1024 * low
    return found


def _size(recipe: Recipe) -> int:
    """Bytes of a frozen weight, and of an activation."""
    dtype: torch.dtype = getattr(torch, recipe.base.dtype)
    return dtype.itemsize


def _parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """All parameters, and those of the input embedding where it is not the output's too."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model.num_parameters(), 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
