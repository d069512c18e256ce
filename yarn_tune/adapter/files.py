"""Adapters on disk: a run writes them for PEFT, and the export reads them, including those trained elsewhere.

adapter_config.json         `YarnTuneConfig`
adapter_model.safetensors   the offsets from search-free YaRN, float32
lora/                       an ordinary PEFT LoRA adapter, where LoRA was learned beside them
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType

from ..errors import UserError
from ..files import Tensors, read_json, read_tensors, save_tensors, unreadable, write_atomically, write_json
from ..models import inside_wrapper
from ..recipe import ADAPTERS, YARN, Base, Export, Lora, Recipe, Rope, load_recipe, parse_sections
from ..tunable import PREFIX, TunableRotary, lora_config
from .config import YARN_TUNE, YarnTuneConfig, layout_keys
from .layer import NUMBERS, last_names

CONFIG, WEIGHTS, BESIDE = "adapter_config.json", "adapter_model.safetensors", "lora"
"""PEFT's names of the files, and the name of the folder with the LoRA adapter."""

ROOT = "base_model.model."
"""Prefix of every tensor's name in PEFT."""

FACTOR = ".lora_{}.weight"
"""Suffix of the names of LoRA's factors A and B in PEFT."""


@dataclass(frozen=True)
class AdapterSections:
    """The sections of a recipe that define what an adapter's numbers mean and how they are served."""

    name: str
    base: Base
    rope: Rope
    export: Export = field(default_factory=Export)
    lora: Lora | None = None


def write_adapter(folder: Path, sections: AdapterSections | Recipe, rotary: TunableRotary, place: str) -> None:
    """Write the learned numbers of a run as a PEFT adapter.

    Args:
        folder: folder of the adapter.
        sections: what the numbers mean; a recipe has all of these sections.
        rotary: module with the learned numbers, adjusted to what a config can carry.
        place: dotted name of the base's rotary module.
    """
    base, export = sections.base, sections.export
    start, whole = rotary.start, rotary.numbers()
    config = YarnTuneConfig(
        base_model_name_or_path=base.model,
        revision=base.revision,
        inference_mode=True,
        window=start.window,
        native=start.native,
        factor=start.factor,
        frequencies=rotary.frequencies,
        query_gains=sections.rope.query_gains,
        qk_bias=sections.rope.qk_bias,
        beta_fast=start.beta_fast,
        beta_slow=start.beta_slow,
        init=start.method,
        stacks=list(export.stacks) if export.stacks else None,
        fold=export.fold,
        as_llama=export.as_llama,
        target_modules=[place],
        **layout_keys(start.facts),
    )
    numbers = {f"{ROOT}{place}.{NUMBERS}.{last}": whole[name] for last, name in last_names(rotary).items()}
    _write(folder, config, numbers)
    if sections.lora is not None:
        factors = {name.removeprefix(PREFIX): tensor for name, tensor in whole.items() if name.startswith(PREFIX)}
        # In a wrapper the last part of a name may be that of a module of the vision tower too.
        modules = sorted({name.removesuffix(".weight.A") for name in factors if name.endswith(".A")})
        beside = lora_config(sections.lora, modules if inside_wrapper(place) else ())
        beside.base_model_name_or_path, beside.revision = base.model, base.revision
        beside.task_type, beside.inference_mode = TaskType.CAUSAL_LM, True
        _write(folder / BESIDE, beside, {_as_peft(name): tensor for name, tensor in factors.items()})


def _write(folder: Path, config: PeftConfig, tensors: Tensors) -> None:
    written = config.to_dict()
    write_atomically(folder / WEIGHTS, save_tensors(tensors, {"format": "pt"}, _meaning(written)))
    write_json(folder / CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in written.items()})


BOUND = (
    "peft_type", "window", "native", "factor", "frequencies", "query_gains", "beta_fast", "beta_slow",
    "base_model_type", "rope_theta", "rotary_dim", "base_scaling", "r", "lora_alpha", "target_modules",
)  # fmt: skip
"""Keys of an adapter's config that define what its numbers mean; the checksum covers them too."""


def _meaning(config: dict[str, Any]) -> str:
    """The values of the `BOUND` keys as JSON, for the checksum of the numbers."""
    kept = {key: config.get(key) for key in BOUND}
    if config.get("init", YARN) != YARN:  # absent in adapters that were written before it existed
        kept["init"] = config["init"]
    plain = {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in kept.items()}
    return json.dumps(plain, sort_keys=True, default=str)


def _read_weights(folder: Path) -> Tensors:
    """The tensors of an adapter; raises `UserError` if they, or what they mean by its config, were changed."""
    config = read_json(folder / CONFIG, "copy the adapter again from where it was made")
    return read_tensors(folder / WEIGHTS, _meaning(config if isinstance(config, dict) else {}))


def _as_peft(name: str) -> str:
    """PEFT's name of a factor `<weight>.A` or `<weight>.B`."""
    weight, _, factor = name.rpartition(".")
    return f"{ROOT}{weight.removesuffix('.weight')}{FACTOR.format(factor)}"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, of whatever type."""
    return (folder / CONFIG).is_file()


def read_sections(folder: Path, overrides: Sequence[str] = ()) -> AdapterSections:
    """What the numbers of an adapter mean and how they are served, by its config.

    The base of a bundled adapter, `recipes/adapters/NAME/`, is that of `recipes/NAME.yaml`.

    Args:
        folder: folder of the adapter.
        overrides: `section.key=value` strings, for the `export` section.

    Raises:
        UserError: if the adapter is of another type, or its config cannot be read.
    """
    config = read_config(folder)
    base: dict[str, Any] = {"model": config.base_model_name_or_path, "revision": config.revision}
    if (recipe := recipe_of_adapter(folder)) is not None:
        base = asdict(recipe.base)
    tree: dict[str, Any] = {
        "name": folder.resolve().name,
        "base": base,
        "rope": vars(config.rope()),
        "export": {"stacks": config.stacks, "fold": config.fold, "as_llama": config.as_llama},
    }
    if is_adapter(folder / BESIDE):
        beside = _lora_beside(folder)
        named = beside.target_modules or ()
        tree["lora"] = {"rank": beside.r, "targets": [named] if isinstance(named, str) else sorted(named)}
    return parse_sections(AdapterSections, tree, list(overrides), str(folder / CONFIG))


def recipe_of_adapter(folder: Path) -> Recipe | None:
    """The recipe of a bundled adapter, `recipes/NAME.yaml` of `recipes/adapters/NAME/`; None for other adapters.

    Raises:
        UserError: if the recipe cannot be read.
    """
    place = folder.resolve()
    path = place.parents[1] / f"{place.name}.yaml"
    return load_recipe(path) if place.parent.name == ADAPTERS and path.is_file() else None


def read_config(folder: Path) -> YarnTuneConfig:
    """The config of a YARN_TUNE adapter.

    Raises:
        UserError: if the adapter is of another type, or its config is damaged.
    """
    path = folder / CONFIG
    try:
        written = read_json(path, "copy the adapter again from where it was made")
        if not isinstance(written, dict):
            raise TypeError("it is not an object")
        kind = written.pop("peft_type", None)
        if kind != YARN_TUNE.value:
            raise UserError(f"{path}: peft_type {kind!r} is not yarn_tune's; PEFT itself loads and merges that adapter")
        config = YarnTuneConfig(**written)
    except TypeError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config.base_model_name_or_path, str) or not config.base_model_name_or_path:
        raise UserError(f"{path}: base_model_name_or_path is missing; name the model the numbers belong to")
    return config


def adapter_numbers(folder: Path, rotary: TunableRotary) -> Tensors:
    """The numbers of an adapter, with LoRA's factors, by the names that `TunableRotary.load_numbers` accepts.

    Raises:
        UserError: if they are damaged, or belong to a base of another layout.
    """
    read_config(folder).start(rotary.start.facts)
    names = last_names(rotary)
    numbers = {}
    for key, tensor in _read_weights(folder).items():
        last = key.rpartition(f".{NUMBERS}.")[2]
        numbers[names.get(last, key)] = tensor
    if is_adapter(folder / BESIDE):
        numbers |= _factors_beside(folder)
    return numbers


PLAIN: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False,
                         "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
"""Values in the config of LoRA for which the change of a weight is B A."""


def _lora_beside(folder: Path) -> LoraConfig:
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder / BESIDE))
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise unreadable(folder / BESIDE / CONFIG, error, "copy the adapter again from where it was made") from error
    values = {**PLAIN, "lora_alpha": getattr(config, "r", None)}
    found = {key: getattr(config, key, None) for key in values}
    wrong = [f"{key} {found[key]!r} is not {value!r}" for key, value in values.items() if found[key] != value]
    if wrong:
        raise UserError(
            f"{folder / BESIDE / CONFIG}: the export merges plain LoRA only, and here {', '.join(wrong)}; merge it "
            "into the base with PEFT first"
        )
    return config


def _factors_beside(folder: Path) -> Tensors:
    """LoRA's factors by the names that yarn_tune uses."""
    _lora_beside(folder)
    found = _read_weights(folder / BESIDE)
    factors = {}
    for name, tensor in found.items():
        for factor in ("A", "B"):
            ending = FACTOR.format(factor)
            if name.endswith(ending):
                factors[f"{PREFIX}{name.removeprefix(ROOT).removesuffix(ending)}.weight.{factor}"] = tensor
    if len(factors) != len(found):
        raise UserError(
            f"{folder / BESIDE / WEIGHTS}: holds more than LoRA's factors; merge it into the base with PEFT"
        )
    return factors
