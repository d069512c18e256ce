"""A first recipe for a model: what its config allows, and what the ablation in recipes/README.md found best."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import UserError
from ..models import BaseModel
from ..recipe import Base, Recipe, parse_recipe
from ..serving import Target, make_representable
from ..tunable import at_start
from .cost import Cost, estimate_cost

FREQUENCIES = ("per_pair", "scale")
QUERY_GAINS = ("pair_phase", "pair", "layer", "none")
"""In order of preference."""


@dataclass(frozen=True)
class Proposal:
    """A recipe as text, and as it is read."""

    text: str
    recipe: Recipe
    cost: Cost


def propose(
    model: str,
    window: int,
    train: list[str],
    heldout: list[str],
    gpu_gib: float,
    revision: str | None = None,
    gpus: int = 1,
    out: str | None = None,
) -> Proposal:
    """The richest recipe that the family can carry and the default stacks serve, with rows that fit the memory.

    Args:
        model: a checkpoint folder or hub id; only its config is read.
        window: to be served, in tokens.
        train: documents to learn from.
        heldout: documents to measure on.
        gpu_gib: memory of one device.
        revision: of a hub id.
        gpus: devices; weights that do not fit one are split over them.
        out: the file it will be written to, which its first lines name; <name>.yaml by default.

    Raises:
        UserError: if this model cannot be tuned, with the reason; or if nothing fits the memory.
    """
    base = BaseModel(Base(model=model, revision=revision))
    facts = base.facts
    refusals: list[str] = []
    tree: dict[str, Any] = {
        "name": f"{model.rstrip('/').rsplit('/', 1)[-1].lower()}-{_short(window)}",
        "base": {"model": model, **({"revision": revision} if revision else {})},
        "rope": {"window": window, "native": facts.native},
        "data": {"train": train, "heldout": heldout, "needles": 0.25},
        "train": {"steps": 100, "batch_size": 8, "short_context_kl": 1.0},
        "eval": {"documents": 8, "retrieval": {}},
    }
    for frequencies, query_gains in itertools.product(FREQUENCIES, QUERY_GAINS):
        tree["rope"] |= {"frequencies": frequencies, "query_gains": query_gains}
        recipe = parse_recipe(tree, [], "init")
        try:
            make_representable(at_start(base, recipe.rope).learned(), Target.of_model(base, recipe.export))
        except UserError as error:
            refusals.append(f"{frequencies}, {query_gains}: {str(error).splitlines()[0]}")
        else:
            break
    else:
        raise UserError("\n".join([f"{model}: nothing can be learned and served:", *refusals]))
    recipe, cost = _fitted(base, tree, gpu_gib, gpus)
    path = out or f"{recipe.name}.yaml"
    return Proposal(_text(recipe, cost, facts.native, gpu_gib, path, refusals), recipe, cost)


Way = dict[str, dict[str, Any]]
"""Changes of a recipe, by section."""


def _fitted(base: BaseModel, tree: dict[str, Any], gpu_gib: float, gpus: int) -> tuple[Recipe, Cost]:
    """The first way to read rows that fits: weights whole in each GPU, else in shards over all of them."""
    window = tree["rope"]["window"]
    spread: list[Way] = [{}]
    if gpus > 1:
        rows = {"batch_size": gpus * math.ceil(tree["train"]["batch_size"] / gpus)}
        spread = [{"train": rows}, {"train": rows, "runtime": {"zero": 3, "processes": gpus}}]
    for way, over in itertools.product(_ways(tree), spread):
        sections = {
            key: tree.get(key, {}) | over.get(key, {}) | way.get(key, {}) for key in {*tree, *over, *way} - {"name"}
        }
        recipe = parse_recipe({"name": tree["name"], **sections}, [], "init")
        cost = estimate_cost(recipe, base.text_config, sum(at_start(base, recipe.rope).count().values()))
        if cost.weights_gib + cost.activations_gib <= 0.9 * gpu_gib:
            return recipe, cost
    need = cost.weights_gib + cost.activations_gib
    raise UserError(
        f"--gpu-memory: {gpu_gib:g} GiB do not hold this model and one row of {window} tokens, however it is read "
        f"(about {need:.1f} GiB in each of {gpus}); name a bigger device, more of them (--gpus) or a smaller --window"
    )


def _ways(tree: dict[str, Any]) -> list[Way]:
    """Whole rows, offloaded if need be; rows of half the window, up to factor 8."""
    window, native = tree["rope"]["window"], tree["rope"]["native"]
    again: dict[str, Any] = {"gradient_checkpointing": True}
    whole: list[dict[str, Any]] = [
        {"gradient_checkpointing": False},
        again | {"keep_attention": True},
        again,
        again | {"offload_activations": True},
    ]
    ways: list[Way] = [{"train": way} for way in whole]
    # Such rows teach gains, not a table: where there are none to learn, they would teach nothing. As much as whole rows
    # do at factors 2 (SmolLM2) and 8 (the demo); shorter ones do not.
    if native < window <= 8 * native and tree["rope"]["query_gains"] != "none":
        half = max(native, window // 2)
        ways += [{"rope": {"frequencies": "fixed"}, "data": {"row_tokens": half}, "train": way} for way in whole]
    return ways


def _text(recipe: Recipe, cost: Cost, native: int, gpu_gib: float, path: str, refusals: list[str]) -> str:
    """Commented YAML: only what differs from the defaults, and why."""
    rope, data, train = recipe.rope, recipe.data, recipe.train
    tokens = train.steps * train.batch_size * recipe.row_tokens()
    lines = [
        f"# {recipe.base.model} from {native} to {rope.window} tokens (factor {rope.window / native:g}).",
        "#",
        f"#   ./launch.sh {path}",
        "#",
        f"# Reads {tokens / 1e6:.1f} million tokens; about {cost.weights_gib + cost.activations_gib:.1f} GiB of "
        f"{gpu_gib:g} GiB by `yarn-tune plan`'s model.",
        *(f"# Not possible here: {line}" for line in refusals),
        f"name: {recipe.name}",
        "base:",
        f"  model: {_plain(recipe.base.model)}",
        *([f"  revision: {recipe.base.revision}"] if recipe.base.revision else []),
        "rope:",
        f"  window: {rope.window}",
        f"  native: {native}               # the config's max_position_embeddings; correct it if training was shorter",
        f"  frequencies: {rope.frequencies}",
        f"  query_gains: {rope.query_gains}"
        + ("" if rope.query_gains == "none" else "       # folded into the queries at export"),
        "data:",
        f"  train: {_plain(data.train)}",
        f"  heldout: {_plain(data.heldout)}      # measured on, never trained on",
        f"  needles: {data.needles}            # rows that end in a question: without them, prose teaches to look near",
        *([f"  row_tokens: {data.row_tokens}       # whole rows do not fit; these teach gains and phases as well"]
          if data.row_tokens else []),
        "train:",
        f"  steps: {train.steps}",
        f"  batch_size: {train.batch_size}           # must be a multiple of the number of GPUs",
        f"  short_context_kl: {train.short_context_kl}              # KL to the base inside the native window",
        f"  gradient_checkpointing: {str(train.gradient_checkpointing).lower()}",
        *(["  keep_attention: true           # checkpointed layers compute all but attention again"]
          if train.keep_attention else []),
        *(["  offload_activations: true      # what is kept for the backward pass waits in the CPU's memory"]
          if train.offload_activations else []),
    ]  # fmt: skip
    if recipe.runtime.zero:
        lines += ["runtime:", f"  zero: {recipe.runtime.zero}                 # frozen weights in shards",
                  f"  processes: {recipe.runtime.processes}            # one a GPU"]  # fmt: skip
    needles = "  retrieval: {}           # needles too: far text can be lost while the mean over tokens is fine"
    return "\n".join([*lines, "eval:", f"  documents: {recipe.eval.documents}", needles, ""])


def _plain(value: object) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
