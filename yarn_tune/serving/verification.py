"""Check what each stack computes from the config of a Hugging Face checkpoint, made by yarn_tune or not.

The reference is `fidelity.json` where there is one (the learned numbers), else what transformers 5 computes from the
same config, else, if transformers 5 does not load it, what the first requested stack that loads it computes. Known
mistakes are explained (`advice.py`), even if they make no difference to the requested stacks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models import FULL, check_types, config_json, is_foreign, language_model, with_nested_text
from .advice import explain
from .conformance import (
    ExpectedRope,
    changed_files,
    folded_kinds,
    frequency_error,
    learned_rope,
    mismatches,
    read_fidelity,
    stock_rope,
)
from .readers import EffectiveRope, Stack, read
from .rules import cannot_extend, load_error
from .selection import Target
from .stacks import STACKS, reading
from .tables import ORIGINAL, Refused

NO_MISMATCH = ("not run by this release", "not established")


@dataclass(frozen=True)
class Line:
    """One stack's row of the table."""

    stack: str
    versions: str
    status: str
    """ok, differs, does not load, not run by this release, not established, or RoPE cannot extend it."""
    frequencies: float | None
    """Largest relative error over layers and regimes; None if there is nothing to compare."""
    multiplier: float | None
    """Multiplier of cos and sin in the tuned layers beyond the original window, including the fold in the weights."""
    window: int
    problems: list[str]


@dataclass(frozen=True)
class Verification:
    """The whole table."""

    checkpoint: str
    reference: str
    lines: list[Line]
    traps: list[str]
    """Known mistakes that may not affect the requested stacks, and notes."""
    errors: list[str]
    """Mistakes that make the config wrong for every stack."""

    @property
    def passed(self) -> bool:
        """Whether no requested stack differs from the reference or fails to load the config."""
        return not self.errors and not any(line.status in ("differs", "does not load") for line in self.lines)

    def text(self) -> str:
        """The table in Markdown, followed by the errors and notes."""
        rows = []
        for line in self.lines:
            numbers = f"{_number(line.frequencies, '.1e')} | {_number(line.multiplier, '.6g')} | {line.window}"
            status = f"{line.status}: {'; '.join(line.problems)}" if line.problems else line.status
            rows.append(f"| {line.stack} ({line.versions}) | {numbers} | {status} |")
        head = ["| stack | frequencies, relative error | multiplier | window | |", "|---|---|---|---|---|"]
        notes = [*(f"- ERROR: {text}" for text in self.errors), *(f"- {text}" for text in self.traps)]
        return "\n".join([f"{self.checkpoint}: {self.verdict()} (compared with {self.reference})", "", *head, *rows,
                          *(["", *notes] if notes else [])])  # fmt: skip

    def verdict(self) -> str:
        """Whether all requested stacks compute the same, in a few words."""
        if not self.passed:
            return "MISMATCH"
        if any(line.status == "RoPE cannot extend it" for line in self.lines):
            return "all stacks read it alike, but RoPE cannot extend it"
        unknown = [line.stack for line in self.lines if line.status in NO_MISMATCH]
        if len(unknown) == len(self.lines):
            return "nothing could be compared"
        return "no mismatch; not compared: " + ", ".join(unknown) if unknown else "all stacks serve it"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verify(
    checkpoint: str,
    stacks: Sequence[str] | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
) -> Verification:
    """Read a checkpoint's config as each stack would; no weights, no engine.

    Args:
        checkpoint: a folder or hub id.
        stacks: names, or `["all"]`; by default those that an export serves and that run this family.
        overrides: the value of vLLM's --hf-overrides; then only vLLM is checked, on the config with these overrides.
        revision: revision of a hub id.

    Raises:
        UserError: if there is no such checkpoint or stack, the config has no RoPE or values of a wrong type, or no
            stack loads it.
    """
    config = config_json(checkpoint, revision)
    check_types(config)
    if overrides is not None:
        return _verify_overridden(checkpoint, config, overrides, stacks)
    fidelity = read_fidelity(checkpoint)
    names, notes = _names(config, stacks, "bias" in folded_kinds(fidelity))
    found = {name: reading_of(name, config) for name in names}
    traps, errors = explain(config)
    reference, expected = _reference(checkpoint, config, found, [*errors, *traps], fidelity)
    lines = [_line(name, each, expected) for name, each in found.items()]
    limit = cannot_extend(config)
    if limit is not None:
        lines = [
            replace(line, status="RoPE cannot extend it")
            if line.status == "ok" and line.stack.startswith(limit.stacks)
            else line
            for line in lines
        ]
        traps = [limit.reason, *traps]
    changed, edited = changed_files(Path(checkpoint))
    return Verification(checkpoint, reference, lines, [*traps, *notes, *edited], [*errors, *changed])


def _names(config: dict[str, Any], stacks: Sequence[str] | None, qk_bias: bool) -> tuple[tuple[str, ...], list[str]]:
    """The stacks to read, and a note about default ones that are left out."""
    if list(stacks or []) == ["all"]:
        return tuple(STACKS), []
    target = Target.of(config, stacks, qk_bias=qk_bias)
    return target.stacks, [f"not checked: {name} {reason}" for name, reason in (target.left_out or {}).items()]


def reading_of(name: str, config: dict[str, Any]) -> EffectiveRope:
    """What a stack computes, with checks of the whole config: whether the stack has its config class and model."""
    found, stack = reading(name, config), STACKS[name]
    if is_foreign(config) and "*" not in stack.foreign and config.get("model_type") not in stack.foreign:
        kind = config.get("model_type")
        if name in ("transformers", "openvino"):
            return replace(found, state="not run by this release", reason=f"transformers has no model type {kind!r}; "
                           "code from the checkpoint is never run here")  # fmt: skip
        return replace(found, state="not established", reason=f"whether it runs model type {kind!r} is not known")
    if found.state == "read" and stack.current_config and not is_foreign(config):
        reason = load_error(config)
        if reason is not None:
            return replace(found, state="does not load", reason=reason)
    return found


def _reference(
    checkpoint: str,
    config: dict[str, Any],
    found: dict[str, EffectiveRope],
    hints: list[str],
    fidelity: dict[str, Any] | None,
) -> tuple[str, ExpectedRope]:
    """fidelity.json, or transformers 5, or the first stack that loads the config."""
    stock = reading_of("transformers", config)
    if fidelity is not None:
        return "fidelity.json", learned_rope(fidelity, config, stock)
    if stock.state == "read":
        return "transformers 5", stock_rope(stock)
    for name, each in found.items():
        if each.state == "read":
            return f"{name}, since transformers 5 does not read it", stock_rope(each)
    reasons = {name: f"{each.state}: {each.reason}" for name, each in ({"transformers": stock} | found).items()}
    raise UserError("\n  ".join([
        f"{checkpoint}: none of the requested stacks loads this config",
        *(f"{name}: {text}" for name, text in reasons.items()), *hints,
    ]))  # fmt: skip


def _line(name: str, found: EffectiveRope, wanted: ExpectedRope) -> Line:
    versions = STACKS[name].versions
    if found.state != "read":
        return Line(name, versions, found.state, None, None, found.window, [found.reason])
    problems = mismatches(found, wanted)
    errors = [
        frequency_error(table.inv_freq, inv_freq)
        for kind, tables in wanted.tables.items()
        for table, (inv_freq, _) in wanted.pairs(kind, found.tables[kind])
    ]
    tuned = found.tables[FULL if FULL in found.tables else next(iter(found.tables))][-1]
    multiplier = tuned.multiplier * math.sqrt(wanted.fold)
    status = "differs" if problems else "ok"
    return Line(name, versions, status, max(errors), multiplier, found.window, problems)


def _verify_overridden(
    checkpoint: str, config: dict[str, Any], overrides: dict[str, Any], stacks: Sequence[str] | None
) -> Verification:
    """The vLLM rows, compared with the config that has the overrides written into it."""
    config = with_nested_text(config)
    every = list(stacks or ["all"]) == ["all"]
    names = tuple([name for name, stack in STACKS.items() if stack.overrides] if every else stacks or [])
    wrong = [name for name in names if name in STACKS and not STACKS[name].overrides]
    if wrong:
        raise UserError(f"--hf-overrides is an option of vLLM; {', '.join(wrong)} does not take it")
    for key in ("text_config", "rope_parameters", "rope_scaling"):
        if not isinstance(overrides.get(key, {}), dict | None):
            raise UserError(f"--hf-overrides: {key} must be an object; found {overrides[key]!r}")
    if isinstance(config.get("text_config"), dict) and overrides.get("text_config", {}) is None:
        raise UserError("--hf-overrides: text_config must be an object; found null")
    intended = overridden(config, overrides)
    check_types(intended)
    found = {name: read_overridden(STACKS[name], config, overrides) for name in names}
    stock = reading_of("transformers", intended)
    if stock.state != "read":
        raise UserError(f"--hf-overrides: transformers 5 does not load this config with them: {stock.reason}")
    traps, errors = explain(intended)
    lines = [_line(name, each, stock_rope(stock)) for name, each in found.items()]
    reference = "transformers 5 with the overrides written into config.json"
    return Verification(checkpoint, reference, lines, [*override_notes(config, overrides), *traps], errors)


KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Keys of a rope section that do not scale it."""


def overridden(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config.json with the overrides applied as intended: keys that do not scale RoPE, such as theta, are kept."""
    inner = "text_config" if isinstance(config.get("text_config"), dict) else None
    given = dict(overrides)
    text = dict(config[inner]) if inner else dict(config)
    if inner:
        given = {k: v for k, v in given.items() if k != inner} | given.get(inner, {})
    section = given.pop("rope_parameters", None) or given.pop("rope_scaling", None)
    if isinstance(section, dict):
        base = next(iter(STACKS["transformers"].sections(*language_model(config)).values()))
        kept = {key: base[key] for key in KEPT if key in base and not language_model(config)[1].nested}
        text = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters")}
        text["rope_parameters"] = kept | section
    text |= given
    return config | {inner: text} if inner else text


def read_overridden(stack: Stack, config: dict[str, Any], overrides: dict[str, Any]) -> EffectiveRope:
    """What vLLM computes under overrides: a dictionary replaces the whole section, except inside a text config."""
    text, layout = language_model(config)
    wrapped = isinstance(config.get("text_config"), dict)
    given = overrides.get("text_config", {}) if wrapped else overrides
    section = given.get("rope_parameters") or given.get("rope_scaling")
    text |= {key: value for key, value in given.items() if not isinstance(value, dict) and key != "rope_theta"}

    def sections(text: dict[str, Any], layout: Any) -> dict[str, dict[str, Any]]:
        found = stack.sections(language_model(config)[0], layout)
        if not isinstance(section, dict):
            return found
        if wrapped:
            return {kind: each | (section.get(kind, {}) if layout.nested else section) for kind, each in found.items()}
        parts = {kind: section.get(kind) for kind in layout.kinds} if layout.nested else {"": section}
        return {kind: _replaced(part, kind) for kind, part in parts.items()}

    return read(replace(stack, sections=sections, modelling=frozenset()), text)


def _replaced(section: Any, kind: str) -> dict[str, Any]:
    """A section as vLLM reads it from an override, without defaults."""
    if not isinstance(section, dict):
        raise Refused(f"KeyError: the override has no section for {kind} layers")
    if "rope_type" not in section:
        raise Refused("KeyError: 'rope_type' (under overrides vLLM does not read type)")
    if section["rope_type"] in ("yarn", "llama3", "longrope") and ORIGINAL not in section:
        raise Refused(f"KeyError: {ORIGINAL!r} (under overrides vLLM does not fill it in)")
    return {"rope_theta": 10000.0} | section


def override_notes(config: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Notes on mistakes that are easily made with these overrides."""
    notes = []
    wrapped = isinstance(config.get("text_config"), dict)
    section = overrides.get("rope_parameters") or overrides.get("rope_scaling")
    if wrapped:
        notes += [
            f"{key} at the top level has no effect: the language model is configured in text_config; write "
            f'{{"text_config": {{"{key}": ...}}}}'
            for key in overrides
            if key != "text_config"
        ]
    elif isinstance(section, dict) and "rope_theta" not in section and not language_model(config)[1].nested:
        theta = next(iter(STACKS["transformers"].sections(*language_model(config)).values()))["rope_theta"]
        notes.append(
            "an override replaces the whole rope section: without rope_theta in it vLLM computes with 10000; add "
            f'"rope_theta": {theta:g}'
        )
    if "rope_theta" in overrides and not wrapped:
        notes.append("rope_theta beside the section has no effect in vLLM; write it inside rope_parameters")
    drafts = [
        key for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if language_model(config)[0].get(key)
    ]
    has = f"; this checkpoint has such layers ({drafts[0]})" if drafts else ""
    notes.append(
        f"vLLM does not pass overrides to a speculative draft (MTP layers){has}: it would run on the unchanged config. "
        "A checkpoint's own config.json applies to the draft too"
    )
    return notes
