"""A first recipe for a model: what its config allows, with the settings that measurements found best.

The settings come from the ablation in recipes/README.md; the learning rates from `learning_rate`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from ..data import has_several
from ..errors import UserError
from ..models import BaseModel
from ..recipe import Base, Recipe, parse_recipe
from ..serving import Target, config_errors, make_representable
from ..tunable import at_start
from .cost import Cost, estimate_cost
from .shape import Shape
from .starter_text import starter_text

FREQUENCIES = ("per_pair", "scale")
"""Values of `rope.frequencies`, in order of preference."""
QUERY_GAINS = ("pair_phase", "pair", "layer", "none")
"""Values of `rope.query_gains`, in order of preference."""
SERVED = {"transformers", "vllm"}
"""Stacks that must read biases of queries and keys where they are proposed; others are left out of the default ones."""
MEASURED_RATES = {"gain": (0.01, 17_280), "phase": (0.01, 17_280), "bias": (0.004, 23_040)}
"""Kind -> the peak rate that worked best on SmolLM2-135M with one row per step, and how many numbers it moved there;
gains and phases count together."""
STEPS, BATCH_SIZE = 100, 8
USABLE = 0.9
"""Share of a device's memory that a recipe may fill."""


@dataclass(frozen=True)
class Hardware:
    """The devices to train on."""

    gpu_gib: float = 80.0
    """Memory of one device in GiB."""
    gpus: int = 1
    """Number of devices; weights that do not fit one device are sharded over all of them."""


@dataclass(frozen=True)
class Proposal:
    """A first recipe."""

    text: str
    """Commented YAML."""
    recipe: Recipe
    """The parsed recipe."""
    cost: Cost


def propose(
    source: str | Base,
    window: int,
    train: list[str],
    heldout: list[str],
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    out: str | None = None,
    native: int | None = None,
) -> Proposal:
    """The recipe with the most learned numbers that the family and the default stacks allow, and that fits the memory.

    Args:
        source: a checkpoint folder, a hub id, or a recipe's `base` section; only the config is read.
        window: tokens to serve.
        train: documents to learn from.
        heldout: documents to measure on.
        hardware: the devices to train on.
        out: the file that the recipe will be written to, for its first lines; default: <name>.yaml.
        native: tokens the model was trained with; None: the config's `max_position_embeddings`.

    Raises:
        UserError: if this model cannot be tuned, with the reason; or if nothing fits the memory.
    """
    section = Base(model=source) if isinstance(source, str) else source
    model, revision = section.model, section.revision
    base = BaseModel(section)
    native = native or base.facts.native
    tree: dict[str, Any] = {
        "name": f"{model.rstrip('/').rsplit('/', 1)[-1].lower()}-{_short(window)}",
        "base": {"model": model, **({"revision": revision} if revision else {})},
        "rope": {"window": window, "native": native},
        "data": {"train": train, "heldout": heldout, "needles": 0.25},
        "train": {"steps": STEPS, "batch_size": BATCH_SIZE, "short_context_kl": 1.0, "decide": has_several(train)},
        "eval": {"documents": 8, "retrieval": {}},
    }
    tree["rope"], refusals = _richest(base, tree)
    recipe, cost = _fitted(base, tree, hardware)
    path = out or f"{recipe.name}.yaml"
    return Proposal(
        starter_text(recipe, cost, native, hardware.gpu_gib, path, refusals, config_errors(base.written)), recipe, cost
    )


def learning_rate(kind: str, numbers: int, batch_size: int) -> float:
    """Peak rate for a kind of learned numbers (a key of `MEASURED_RATES`), how many there are, and the rows per step.

    AdamW moves every number by about the rate in each step, whether its gradient is signal or noise. On SmolLM2-135M
    (17,280 gains and phases, one row per step) rates of 0.03 to 0.04 moved them mostly by noise: on text unlike the
    training text the tuned model was worse than search-free YaRN, by 0.008 and 0.021 in NLL on two documents. With
    rates of 0.01, and 0.004 for biases, it was better by 0.039 and 0.041 on two others (recipes/README.md); biases at
    0.012 beside 0.04 brought nothing. The noise of a gradient falls with the square root of the batch size, and the
    length of a step by noise grows with the square root of the number of parameters; the rule follows both. It keeps
    within 0.3 and 3 times the measured rate: 0.003 was the lowest tried for gains, and 0.03 works on the demo (1,024
    gains and phases, four rows per step).
    """
    measured, count = MEASURED_RATES[kind]
    rate = measured * math.sqrt(batch_size) * math.sqrt(count / max(numbers, 1))
    return float(f"{min(max(rate, 0.3 * measured), 3 * measured):.2g}")


def _richest(base: BaseModel, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The `rope` section with the most learned numbers that can be served, and why richer ones cannot."""
    refusals: list[str] = []
    biases = {"qk_bias": True} if bias_is_served(base, tree) else {}
    begin = {"init": "ntk"} if base.facts.theta_only else {}
    for frequencies, query_gains in itertools.product(("fixed",) if begin else FREQUENCIES, QUERY_GAINS):
        if frequencies == "fixed" and query_gains == "none":
            break  # nothing would be learned
        section = tree["rope"] | begin | {"frequencies": frequencies, "query_gains": query_gains} | biases
        recipe = parse_recipe(tree | {"rope": section}, [], "init")
        try:
            make_representable(at_start(base, recipe.rope).learned(), Target.of_model(base, recipe.export, recipe.rope))
        except UserError as error:
            refusals.append(f"{frequencies}, {query_gains}: {str(error).splitlines()[0]}")
        else:
            return section, refusals
    raise UserError("\n".join([f"{base.source.model}: nothing can be learned and served:", *refusals]))


def bias_is_served(base: BaseModel, tree: dict[str, Any]) -> bool:
    """Whether biases of queries and keys can be learned, and are read by transformers and vLLM."""
    section = tree["rope"] | {"frequencies": "fixed", "qk_bias": True}
    recipe = parse_recipe(tree | {"rope": section}, [], "init")
    try:
        begin, target = at_start(base, recipe.rope), Target.of_model(base, recipe.export, recipe.rope)
        make_representable(begin.learned(), target)
    except UserError:
        return False
    return set(target.stacks) >= SERVED


Changes = dict[str, dict[str, Any]]
"""Changes of a recipe, by section."""


def _fitted(base: BaseModel, tree: dict[str, Any], hardware: Hardware) -> tuple[Recipe, Cost]:
    """The first way to read rows that fits: weights whole on each device, else sharded over all of them."""
    window, gpus = tree["rope"]["window"], hardware.gpus
    shape = Shape.of(base.config, native=base.facts.native)
    spread: list[Changes] = [{}]
    if gpus > 1:
        rows = {"batch_size": gpus * math.ceil(tree["train"]["batch_size"] / gpus)}
        spread = [{"train": rows}, {"train": rows, "runtime": {"zero": 3, "processes": gpus}}]
    for way, over in itertools.product(_ways(tree), spread):
        recipe = with_rates(base, _merged(_merged(tree, over), way))
        numbers = sum(at_start(base, recipe.rope).count().values())
        cost = estimate_cost(recipe, shape, numbers)
        if cost.memory_gib <= USABLE * hardware.gpu_gib:
            return recipe, cost
    raise UserError(
        f"--gpu-memory: {hardware.gpu_gib:g} GiB do not hold this model and one row of {window} tokens, however it is "
        f"read (about {cost.memory_gib:.1f} GiB on each of {gpus}); name a bigger device, more of them (--gpus) or a "
        "smaller --window"
    )


def _merged(tree: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """A tree with changes in its sections."""
    return tree | {section: tree.get(section, {}) | values for section, values in changes.items()}


def with_rates(base: BaseModel, tree: dict[str, Any]) -> Recipe:
    """The recipe of a tree, with learning rates for its gains, phases and biases."""
    recipe = parse_recipe(tree, [], "init")
    counts, batch_size = at_start(base, recipe.rope).count(), recipe.train.batch_size
    by_pair = recipe.rope.query_gains.startswith("pair")
    kinds: list[str] = [kind for kind in ("gain", "phase") if kind in counts and by_pair]
    together = sum(counts[kind] for kind in kinds)
    rates = {kind: learning_rate(kind, together, batch_size) for kind in kinds}
    if "bias" in counts:
        rates["bias"] = learning_rate("bias", counts["bias"], batch_size)
    return parse_recipe(_merged(tree, {"train": {"learning_rate": rates}}), [], "init") if rates else recipe


def _ways(tree: dict[str, Any]) -> list[Changes]:
    """Ways to read rows, the fastest first: whole rows; then, up to factor 8, rows of half the window."""
    window, native = tree["rope"]["window"], tree["rope"]["native"]
    again: dict[str, Any] = {"gradient_checkpointing": True}
    whole: list[dict[str, Any]] = [
        {"gradient_checkpointing": False},
        again | {"keep_attention": True},
        again,
        again | {"offload_activations": True},
    ]
    ways: list[Changes] = [{"train": way} for way in whole]
    # Rows of half the window train gains and phases as well as whole rows do, at factors 2 (SmolLM2) and 8 (the demo);
    # shorter rows do not. Rows of half the window do not train a table of frequencies.
    if native < window <= 8 * native and tree["rope"]["query_gains"] != "none":
        half = max(native, window // 2)
        ways += [{"rope": {"frequencies": "fixed"}, "data": {"row_tokens": half}, "train": way} for way in whole]
    return ways


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
