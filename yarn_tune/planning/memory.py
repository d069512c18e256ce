"""The peak memory of a step in one process, counted tensor by tensor.

The count covers the tensors that torch holds at the worst moment for a pre-norm decoder with a gated MLP, whose frozen
matrices need no input for their gradients. `benchmarks/memory.py` measures this peak; the prediction is within 20%.

In the code: h, q, k, m are the widths of the hidden state, queries, keys (and values) and the MLP, in numbers per
token; e is the number of bytes per number.
"""

import torch

from ..models import CHUNK, GIB
from ..recipe import Recipe
from ..training import ObjectiveConfig
from ..tunable import kinds_of
from .shape import Shape

STATE = 16
"""Bytes per learned number: value, gradient and two moments, in float32."""
LIVE = 10**9
"""Parameters that DeepSpeed keeps gathered (`stage3_max_live_parameters`)."""
GPUS = (24, 40, 80)
"""Memory of common GPUs, in GiB."""
RESERVE = 0.08
"""Share of a GPU's memory that is not available: the CUDA context, workspaces of libraries, fragmentation."""


def weight_memory(recipe: Recipe, shape: Shape, numbers: int = 1) -> float:
    """Bytes of the frozen weights in one process and of the learned numbers.

    Args:
        recipe: recipe of the run, which defines how the weights are sharded.
        shape: sizes of the base model.
        numbers: number of learned numbers, without those of LoRA.
    """
    e = _size(recipe)
    whole: float = shape.parameters * e
    shards = recipe.runtime.processes or 1
    if recipe.sharded() and shards > 1:
        # A process holds its shard, and in full the current layer, the layer that is being fetched, and the
        # vocabulary matrix. DeepSpeed keeps gathered weights until there are `LIVE` of them.
        layer = (shape.parameters - 2 * shape.embedding - shape.unread) * e / shape.layers
        live = max(2 * layer, LIVE * e) if recipe.runtime.zero == 3 else 2 * layer
        own = 0.0 if recipe.runtime.offload == "cpu" else whole / shards
        whole = min(whole, own + live + shape.vocabulary * shape.hidden * e)
    return whole + (numbers + shape.lora.numbers) * STATE


def step_memory(recipe: Recipe, shape: Shape, row_tokens: int) -> float:
    """Bytes of the activations at the worst moment of a step with rows of `row_tokens` tokens."""
    e, rows = _size(recipe), recipe.train.micro_batch_size
    tokens = rows * row_tokens / recipe.runtime.sequence
    logits = 3.0 * CHUNK * shape.vocabulary * 4
    reading = tokens * _reading(shape, e)
    if recipe.data.packing == "concat" or shape.sliding:
        # Attention that excludes tokens needs a mask of the whole row, as booleans and as numbers.
        mask = rows * row_tokens**2 * (1 + e)
        logits, reading = logits + mask, reading + mask
    kept, worst = _training(recipe, shape, tokens)
    native = recipe.rope.native or shape.native
    base_reads = ObjectiveConfig.of(recipe.train, native).base_reads
    if base_reads != "nothing":
        # The base reads while the model's activations are held; its states are kept until the backward pass.
        base = reading if base_reads == "slid" else rows * min(native, row_tokens) * _reading(shape, e)
        states = tokens * shape.hidden * e
        kept, worst = kept + states, max(kept + base, worst + states)
    return max(worst, kept + logits)


def _reading(shape: Shape, e: int) -> float:
    """Bytes per token of a forward pass without gradients, at its worst moment: in the MLP of a layer."""
    # Embedding, the layer's input, the sum after attention and its norm; both factors of the MLP and their product.
    return (4 * shape.hidden + 3 * shape.inner) * e + 2 * shape.rotary * e


def _training(recipe: Recipe, shape: Shape, tokens: float) -> tuple[float, float]:
    """Bytes that are kept between forward and backward pass, and bytes at the worst moment of the backward pass."""
    h, q, k, m, e = shape.hidden, shape.queries, shape.keys, shape.inner, _size(recipe)
    train = recipe.train
    norm = h * 4 if e == 2 else 0  # norms compute in float32, of a copy
    attention = _attention(recipe, shape, norm)
    mlp = (h if train.tiled_mlp else 3 * m) * e + h * e + norm  # both factors and the activation; the sum before it
    layer = attention + mlp
    # With checkpointing only the inputs of the layers are kept, in CPU memory if they are offloaded.
    inputs = 0.0 if train.offload_activations else shape.layers * h * e
    if train.keep_attention:
        inputs += shape.layers * (q * e + q / shape.rotary * 4)  # attention's output; a float32 logarithm per head
    kept = inputs if train.gradient_checkpointing else inputs + shape.layers * layer
    outside = (h + 4 * shape.rotary) * e
    held = kept + (layer if train.gradient_checkpointing else 0.0) + outside
    if not train.tiled_mlp:
        # The gradients of the layer's output, of the MLP's product and of both its factors.
        return tokens * (kept + outside), tokens * (held + (h + 3 * m) * e)
    # The worst moment is in a tile of the MLP, in the norm before it (float32), or in attention.
    in_tile = train.micro_batch_size * train.tiled_mlp * (h + 6 * m) * e
    in_norm, in_attention = h * e + 3 * h * 4, (2 * h + 2 * q + 2 * k) * e
    worst = max(
        tokens * (held + 2 * h * e) + in_tile, tokens * (held - mlp + max(in_norm + norm + h * e, in_attention))
    )
    return tokens * (kept + outside), worst


def _attention(recipe: Recipe, shape: Shape, norm: int) -> float:
    """Bytes per token that the attention of a layer keeps for its backward pass."""
    q, k, e = shape.queries, shape.keys, _size(recipe)
    copies = sum(kind.kept_queries for kind in kinds_of(recipe.rope))
    kept = copies * q * e  # queries, for the gradients of the numbers that act on them
    kept += (2 * q + 2 * k) * e  # queries and keys, and both with exchanged halves, for cos and sin
    kept += (2 * q + 2 * k) * e + norm  # rotated queries and keys, values and output, for attention
    # The inputs of the adapted modules, for the gradients of LoRA's A factors; in the mean over layers.
    inputs = (shape.lora.shared if e == 4 else shape.lora.copied) // shape.layers
    return kept + 4 * inputs


def largest_rows(recipe: Recipe, shape: Shape, weights: float) -> dict[int, int]:
    """The longest row that fits beside the weights, per GPU size: GiB -> tokens, a multiple of 1024.

    Args:
        recipe: recipe of the run, which defines how rows are read.
        shape: sizes of the base model.
        weights: bytes of the weights.

    Returns:
        The longest rows; 0 tokens if not even 1024 fit.
    """

    def fits(gib: int, tokens: int) -> bool:
        return weights + step_memory(recipe, shape, tokens) <= (1 - RESERVE) * gib * GIB

    found = {}
    for gib in GPUS:
        low, high = 0, 2**14  # in 1024 tokens: `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(gib, 1024 * middle) else (low, middle)
        found[gib] = 1024 * low
    return found


def _size(recipe: Recipe) -> int:
    """Bytes per number of the frozen weights and of the activations."""
    dtype: torch.dtype = getattr(torch, recipe.base.dtype)
    return dtype.itemsize
