"""What no run can have: values and combinations, each with its place in the recipe and the remedy."""

from dataclasses import asdict
from typing import Any

from .parsing import show
from .schema import YARN, Recipe, Rope, Train

Check = tuple[bool, str, Any, str]
"""(holds, place, value, remedy)"""


def impossible(recipe: Recipe) -> list[str]:
    """Every value and combination that no run can have; what depends on the base model is checked with it."""
    checks = [
        *rope_checks(recipe.rope),
        *_data_checks(recipe),
        *_learned_checks(recipe),
        *_train_checks(recipe.train),
        *_other_checks(recipe),
        *_runtime_checks(recipe),
        *_retrieval_checks(recipe),
    ]
    return unmet(checks)


def unmet(checks: list[Check]) -> list[str]:
    """The messages of those that do not hold."""
    return [f"{place}: {remedy}; found {show(value)}" for holds, place, value, remedy in checks if not holds]


def rope_checks(rope: Rope) -> list[Check]:
    """Of the rope section by itself."""
    inside = rope.native is None or 2 <= rope.native <= rope.window
    native = f"the native window must be between 2 and rope.window ({rope.window}); this tool only extends"
    swapped = f"must exceed rope.beta_slow ({rope.beta_slow}); are the betas swapped?"
    return [
        (rope.window >= 2, "rope.window", rope.window, "a window is at least 2 tokens"),
        (inside, "rope.native", rope.native, native),
        (rope.factor is None or rope.factor >= 1, "rope.factor", rope.factor, "a factor below 1 shrinks"),
        (bool(rope.init), "rope.init", rope.init, f"{YARN}, or the folder of a finished run or an adapter"),
        (rope.beta_slow > 0, "rope.beta_slow", rope.beta_slow, "must be positive"),
        (rope.beta_fast > rope.beta_slow, "rope.beta_fast", rope.beta_fast, swapped),
    ]


def _data_checks(recipe: Recipe) -> list[Check]:
    data, row_tokens = recipe.data, recipe.row_tokens()
    both = sorted(set(data.train) & set(data.heldout))
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
        (0 <= data.needles <= 1, "data.needles", data.needles, "a share of the rows, from 0.0 to 1.0"),
        (
            data.needles == 0 or data.packing == "long",
            "data.needles",
            data.needles,
            "questions are planted in rows that documents do not share: set data.packing to long",
        ),
        *_length_checks(recipe),
    ]


def _length_checks(recipe: Recipe) -> list[Check]:
    data, train, row_tokens = recipe.data, recipe.train, recipe.row_tokens()
    lengths = data.lengths
    fit = lengths is None or (bool(lengths) and all(2 <= n <= row_tokens and row_tokens % n == 0 for n in lengths))
    whole = "needs rows of one span each: set data.packing to long"
    taught = train.objective != "next-token" or train.short_context_kl > 0
    return [
        (fit, "data.lengths", lengths, f"lengths that divide data.row_tokens ({row_tokens}), or null"),
        (lengths is None or data.packing == "long", "data.lengths", lengths, whole),
        (
            not taught or data.packing == "long",
            "data.packing",
            data.packing,
            "the base is asked about rows of one span: with this objective or guard set it to long",
        ),
    ]


def _train_checks(train: Train) -> list[Check]:
    rates, decays = train.rates(), train.decays()
    micro = train.micro_batch_size >= 1 and train.batch_size % max(train.micro_batch_size, 1) == 0
    return [
        (train.steps >= 1, "train.steps", train.steps, "at least 1"),
        (train.batch_size >= 1, "train.batch_size", train.batch_size, "at least 1"),
        (micro, "train.micro_batch_size", train.micro_batch_size, f"must divide train.batch_size ({train.batch_size})"),
        *[(rate > 0, f"train.learning_rate.{kind}", rate, "must be positive") for kind, rate in asdict(rates).items()],
        *[(d >= 0, f"train.weight_decay.{kind}", d, "must not be negative") for kind, d in asdict(decays).items()],
        (0 <= train.warmup < 1, "train.warmup", train.warmup, "a share of the steps, from 0 to below 1"),
        (train.short_context_kl >= 0, "train.short_context_kl", train.short_context_kl, "must not be negative"),
        (train.answer_weight >= 0, "train.answer_weight", train.answer_weight, "must not be negative"),
        (
            not train.keep_attention or train.gradient_checkpointing,
            "train.keep_attention",
            train.keep_attention,
            "it is about checkpointed layers: set train.gradient_checkpointing to true",
        ),
        (
            not train.offload_activations or train.gradient_checkpointing,
            "train.offload_activations",
            train.offload_activations,
            "what waits are the inputs of checkpointed layers: set train.gradient_checkpointing to true",
        ),
        (train.tiled_mlp is None or train.tiled_mlp >= 1, "train.tiled_mlp", train.tiled_mlp, "at least 1, or null"),
        (0 <= train.seed < 2**32, "train.seed", train.seed, "from 0 to below 2**32"),
        (train.clip >= 0, "train.clip", train.clip, "a gradient norm, or 0 for none"),
        (train.checkpoint_every >= 1, "train.checkpoint_every", train.checkpoint_every, "at least 1"),
        (train.keep_checkpoints >= 2, "train.keep_checkpoints", train.keep_checkpoints, "at least 2"),
    ]


def _learned_checks(recipe: Recipe) -> list[Check]:
    lora = recipe.lora
    nothing = recipe.rope.frequencies == "fixed" and recipe.rope.query_gains == "none" and lora is None
    return [
        (not nothing, "rope.frequencies", "fixed", "learns nothing by itself; set rope.query_gains, or add lora"),
        (lora is None or lora.rank >= 1, "lora.rank", lora and lora.rank, "at least 1"),
        (lora is None or bool(lora.targets), "lora.targets", lora and lora.targets, "name at least one module"),
    ]


def _retrieval_checks(recipe: Recipe) -> list[Check]:
    wanted, window = recipe.eval.retrieval, recipe.rope.window
    if wanted is None:
        return []
    place = "eval.retrieval"
    fits = wanted.lengths is None or (wanted.lengths and all(2 <= n <= window for n in wanted.lengths))
    shares = bool(wanted.depths) and all(0 <= depth <= 1 for depth in wanted.depths)
    return [
        (bool(fits), f"{place}.lengths", wanted.lengths, f"lengths from 2 to rope.window ({window}), or null"),
        (shares, f"{place}.depths", wanted.depths, "shares of the prompt, from 0.0 to 1.0"),
        (wanted.per_cell >= 1, f"{place}.per_cell", wanted.per_cell, "at least 1"),
        (wanted.keys >= 1, f"{place}.keys", wanted.keys, "at least 1"),
    ]


def _other_checks(recipe: Recipe) -> list[Check]:
    evaluation, name = recipe.eval, recipe.name
    window = recipe.rope.window
    fits = all(2 <= length <= window for length in evaluation.lengths or [])
    folder = bool(name) and "/" not in name and name not in (".", "..")
    return [
        (fits, "eval.lengths", evaluation.lengths, f"lengths from 2 to rope.window ({window})"),
        (evaluation.lengths != [], "eval.lengths", evaluation.lengths, "name a length, or null"),
        (evaluation.documents >= 1, "eval.documents", evaluation.documents, "at least 1"),
        (evaluation.buckets >= 1, "eval.buckets", evaluation.buckets, "at least 1"),
        (evaluation.chunk is None or evaluation.chunk >= 1, "eval.chunk", evaluation.chunk, "at least 1, or null"),
        (evaluation.key_gain > 0, "eval.key_gain", evaluation.key_gain, "must be positive"),
        (evaluation.key_floor > 0, "eval.key_floor", evaluation.key_floor, "must be positive"),
        (evaluation.stride is None or evaluation.stride >= 1, "eval.stride", evaluation.stride, "at least 1"),
        (recipe.export.stacks != [], "export.stacks", recipe.export.stacks, "name at least one stack, or null"),
        (recipe.export.tolerance > 0, "export.tolerance", recipe.export.tolerance, "must be positive"),
        (folder, "name", name, "a plain folder name"),
    ]


def _runtime_checks(recipe: Recipe) -> list[Check]:
    runtime, train, data = recipe.runtime, recipe.train, recipe.data
    count, split = runtime.processes, runtime.sequence
    lengths = [recipe.row_tokens(), *(data.lengths or [])]
    plain = train.objective == "next-token" and train.short_context_kl == 0
    return [
        (count is None or count >= 1, "runtime.processes", count, "at least 1"),
        (runtime.threads is None or runtime.threads >= 1, "runtime.threads", runtime.threads, "at least 1"),
        (not (runtime.zero == 3 and runtime.fsdp), "runtime.fsdp", True, "runtime.zero: 3 shards the weights already"),
        (
            runtime.offload == "none" or recipe.sharded(),
            "runtime.offload",
            runtime.offload,
            "only shards can wait in the CPU's memory: set runtime.zero to 3, or runtime.fsdp",
        ),
        (
            0 < runtime.timeout_minutes <= 10080,
            "runtime.timeout_minutes",
            runtime.timeout_minutes,
            "above 0, up to a week (10080)",
        ),
        (split >= 1, "runtime.sequence", split, "at least 1"),
        (split < 1 or count is None or count % split == 0, "runtime.sequence", split, f"must divide {count} processes"),
        (
            split < 1 or all(n % split == 0 for n in lengths),
            "runtime.sequence",
            split,
            f"must divide the lengths of rows ({', '.join(map(str, lengths))})",
        ),
        (
            split == 1 or plain,
            "runtime.sequence",
            split,
            "the base cannot be asked about a part of a row: set train.objective to next-token and "
            "train.short_context_kl to 0",
        ),
        (
            split == 1 or data.packing == "long",
            "runtime.sequence",
            split,
            "attention over split rows cannot keep documents apart: set data.packing to long",
        ),
    ]
