"""The text of a first recipe: commented YAML with the settings that differ from the defaults, and why."""

import yaml

from ..recipe import YARN, Rates, Recipe
from .cost import Cost


def starter_text(
    recipe: Recipe, cost: Cost, native: int, gpu_gib: float, path: str, refusals: list[str], mistakes: list[str]
) -> str:
    """The recipe as commented YAML.

    Args:
        recipe: the recipe.
        cost: its cost.
        native: native window of the base.
        gpu_gib: memory of one device, in GiB.
        path: the file it will be written to.
        refusals: why richer recipes are not possible.
        mistakes: mistakes in the config of the base.
    """
    warnings = [f"# WARNING: the base's config.json: {text}" for text in mistakes]
    lines = [*warnings, *_head(recipe, cost, native, gpu_gib, path, refusals), *_rope(recipe, native), *_data(recipe)]
    lines += _train(recipe)
    if recipe.runtime.zero:
        lines += [
            "runtime:",
            f"  zero: {recipe.runtime.zero}                 # shard the frozen weights",
            f"  processes: {recipe.runtime.processes}            # one per GPU",
        ]
    lines += [
        "eval:",
        f"  documents: {recipe.eval.documents}",
        "  retrieval: {}           # a model can lose distant text while its mean NLL looks good",
        "",
    ]
    return "\n".join(lines)


def _head(recipe: Recipe, cost: Cost, native: int, gpu_gib: float, path: str, refusals: list[str]) -> list[str]:
    tokens = recipe.train.steps * recipe.train.batch_size * recipe.row_tokens()
    window = recipe.rope.window
    return [
        f"# {recipe.base.model} from {native} to {window} tokens (factor {window / native:g}).",
        "#",
        f"#   ./launch.sh {path}",
        "#",
        f"# Reads {tokens / 1e6:.1f} million tokens; needs about {cost.memory_gib:.1f} of {gpu_gib:g} GiB (estimated).",
        *(f"# Not possible here: {line}" for line in refusals),
        f"name: {recipe.name}",
        "base:",
        f"  model: {_yaml(recipe.base.model)}",
        *([f"  revision: {recipe.base.revision}"] if recipe.base.revision else []),
    ]


def _rope(recipe: Recipe, native: int) -> list[str]:
    gains = recipe.rope.query_gains
    bias = ["  qk_bias: true           # offsets of queries and keys, exported as biases of their projections"]
    init = [] if recipe.rope.init == YARN else [f"  init: {recipe.rope.init}                # configs carry theta only"]
    return [
        "rope:",
        f"  window: {recipe.rope.window}",
        f"  native: {native}               # from the config; correct it if the model was trained on shorter text",
        *init,
        f"  frequencies: {recipe.rope.frequencies}",
        f"  query_gains: {gains}" + ("" if gains == "none" else "       # folded into the query weights at export"),
        *(bias if recipe.rope.qk_bias else []),
    ]


def _data(recipe: Recipe) -> list[str]:
    data = recipe.data
    lines = [
        "data:",
        f"  train: {_yaml(data.train)}",
        f"  heldout: {_yaml(data.heldout)}      # for measuring; never trained on",
        f"  needles: {data.needles}            # rows that end in a question about distant text",
    ]
    if data.row_tokens:
        lines.append(f"  row_tokens: {data.row_tokens}       # whole rows do not fit; these train gains as well")
    return lines


def _train(recipe: Recipe) -> list[str]:
    train = recipe.train
    lines = [
        "train:",
        f"  steps: {train.steps}",
        f"  batch_size: {train.batch_size}           # a multiple of the number of GPUs",
    ]
    if isinstance(train.learning_rate, Rates) and train.learning_rate != Rates():
        rates = {name: rate for name in ("gain", "phase", "bias") if (rate := getattr(train.learning_rate, name))}
        own = {name: rate for name, rate in rates.items() if rate != getattr(Rates, name)}
        lines.append(f"  learning_rate: {_yaml(own)}  # lower for more numbers, higher for more rows per step")
    lines += [
        f"  short_context_kl: {train.short_context_kl}              # keep predictions inside the native window",
        f"  gradient_checkpointing: {str(train.gradient_checkpointing).lower()}",
    ]
    if train.decide:
        lines.append("  decide: true           # keep nothing that is worse on validation rows than search-free YaRN")
    else:
        lines.append("  decide: false          # data.train is one document; with others in data.validation: true")
    if train.keep_attention:
        lines.append("  keep_attention: true           # do not compute attention twice")
    if train.offload_activations:
        lines.append("  offload_activations: true      # keep the inputs of layers in CPU memory")
    return lines


def _yaml(value: object) -> str:
    """A value in one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip().removesuffix("...").strip()
    )
