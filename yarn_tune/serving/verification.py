"""What each stack will serve from a checkpoint, from its config alone: any Hugging Face checkpoint, ours or not.

The measure is `fidelity.json` where there is one (what was learned), else what transformers 5 computes from the same
config. Known traps are explained in words, also where they happen to hurt no stack asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import CHECKSUMS, file_digest, read_checked
from ..models import FULL, config_json, layout_of
from ..rope import yarn_attention_factor
from .conformance import ExpectedRope, frequency_error, mismatches
from .readers import ORIGINAL, EffectiveRope, Section
from .rules import v5_sections
from .selection import Target
from .stacks import STACKS, reading


@dataclass(frozen=True)
class Line:
    """One stack's row of the table."""

    stack: str
    versions: str
    frequencies: float | None
    """Largest relative error over layers and regimes; None if it does not load the checkpoint."""
    multiplier: float | None
    """Of cos and sin in the tuned layers beyond the original window, the fold in the weights included."""
    window: int
    problems: list[str]


@dataclass(frozen=True)
class Verification:
    """The whole table."""

    checkpoint: str
    reference: str
    lines: list[Line]
    traps: list[str]
    errors: list[str]
    """Traps that make the config wrong for every stack."""

    @property
    def passed(self) -> bool:
        """Whether every stack asked for serves the reference."""
        return not self.errors and not any(line.problems for line in self.lines)

    def text(self) -> str:
        """For people."""
        rows = []
        for line in self.lines:
            numbers = f"{_number(line.frequencies, '.1e')} | {_number(line.multiplier, '.6g')} | {line.window}"
            rows.append(f"| {line.stack} ({line.versions}) | {numbers} | {'; '.join(line.problems) or 'ok'} |")
        head = ["| stack | frequencies, relative error | multiplier | window | |", "|---|---|---|---|---|"]
        notes = [f"- {text}" for text in (*self.errors, *self.traps)]
        verdict = "all stacks serve it" if self.passed else "MISMATCH"
        return "\n".join([f"{self.checkpoint}: {verdict} (measured against {self.reference})", "", *head, *rows,
                          *(["", *notes] if notes else [])])  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verify(checkpoint: str, stacks: Sequence[str] | None = None) -> Verification:
    """Check a checkpoint folder or hub id for `stacks`, the usual ones by default.

    Raises:
        UserError: if there is no such checkpoint or stack, or the config has no RoPE to check.
    """
    config = config_json(checkpoint)
    names = Target.of(config, stacks).stacks if list(stacks or []) != ["all"] else tuple(STACKS)
    reference, wanted = _reference(checkpoint, config)
    lines = [_line(name, reading(name, config), wanted) for name in names]
    traps, errors = explain(config)
    errors += changed_files(Path(checkpoint))
    return Verification(checkpoint, reference, lines, traps, errors)


def changed_files(folder: Path) -> list[str]:
    """The files of an export that changed since it was written, in words; empty for a checkpoint of another tool.

    Raises:
        UserError: if the export's own list of checksums is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return []
    problems = []
    for name, digest in read_checked(path, "run `yarn-tune export` again")["files"].items():
        try:
            if file_digest(folder / name) != digest:
                problems.append(f"{name}: changed since it was exported")
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
    return problems


def _reference(checkpoint: str, config: dict[str, Any]) -> tuple[str, ExpectedRope]:
    """fidelity.json, or transformers 5."""
    stock = reading("transformers", config)
    fidelity = Path(checkpoint) / "fidelity.json"
    if fidelity.is_file():
        said = read_checked(fidelity, "run `yarn-tune export` again")
        kind = FULL if layout_of(config).nested else ""
        tuned = (torch.tensor(said["inv_freq"]), float(said["attention_factor"]))
        others = {k: (tables[-1].inv_freq, tables[-1].multiplier) for k, tables in stock.tables.items() if k != kind}
        fold = float(said.get("fold", {}).get("gain", 1.0))
        tables = {kind: [tuned]} | {k: [t] for k, t in others.items()}
        return "fidelity.json", ExpectedRope(tables, said["window"], said.get("softmax_gain", 1.0), fold)
    if stock.refusal is not None:
        raise UserError(f"{checkpoint}: transformers 5 itself does not load this rope section: {stock.refusal}")
    tables = {kind: [(t.inv_freq, t.multiplier) for t in regimes] for kind, regimes in stock.tables.items()}
    return "transformers 5", ExpectedRope(tables, stock.window, stock.softmax_gain)


def _line(name: str, found: EffectiveRope, wanted: ExpectedRope) -> Line:
    problems = mismatches(found, wanted)
    if found.refusal is not None:
        return Line(name, STACKS[name].versions, None, None, found.window, problems)
    errors = [
        frequency_error(table.inv_freq, inv_freq)
        for kind, tables in wanted.tables.items()
        for table, (inv_freq, _) in wanted.pairs(kind, found.tables[kind])
    ]
    tuned = found.tables[FULL if FULL in found.tables else next(iter(found.tables))][-1]
    multiplier = tuned.multiplier * math.sqrt(wanted.fold)
    return Line(name, STACKS[name].versions, max(errors), multiplier, found.window, problems)


def explain(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(traps, errors) of a config in plain words; an error is one for every stack."""
    layout = layout_of(config)
    traps, errors = [], []
    for kind, section in v5_sections(config, layout).items():
        where = f" ({kind})" if kind else ""
        rope_type = section.get("rope_type") or section.get("type") or "default"
        if rope_type == "yarn":
            traps += [text + where for text in _yarn_traps(config, section, nested=bool(kind))]
            errors += [text + where for text in _window_left(config, section)]
        if rope_type in ("longrope", "su"):
            traps += [text + where for text in _longrope_traps(section)]
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if scaling and not _theta_written(config, layout.nested):
        errors.append(
            "theta lost: rope_theta stands neither beside the rope section nor in the one that is read, so every "
            f"reader falls back to the family's {next(iter(layout.thetas.values())):g}"
        )
    elif config.get("rope_parameters") and not config.get("rope_scaling"):
        traps.append(
            "written for transformers 5 only: rope_parameters without rope_scaling and rope_theta; transformers 4, "
            "vLLM before 0.12 and others read theta 10000 and no scaling"
        )
    return traps, errors


def _theta_written(config: dict[str, Any], nested: bool) -> bool:
    if config.get("rope_theta") is not None or config.get("rotary_emb_base") is not None:
        return True
    section: Section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parts = [config.get("rope_parameters", {}).get(FULL) or {}] if nested else [section]
    return all(part.get("rope_theta") is not None for part in parts)


def _yarn_traps(config: dict[str, Any], section: Section, nested: bool) -> list[str]:
    """Known ways for a yarn section to be read differently."""
    texts = []
    factor, longest = section.get("factor"), config["max_position_embeddings"]
    original = section.get(ORIGINAL) or longest
    if factor is None:
        return ["factor is null: transformers takes max_position_embeddings / original, others fail"]
    given = section.get("attention_factor")
    own = yarn_attention_factor(factor)
    if given is not None and abs(given / own - 1) > 1e-6 and "attn_factor" not in section:
        texts.append(
            f"attention_factor ignored: transformers and vLLM from 0.30 multiply cos and sin by {given:.6g}; vLLM up "
            f"to 0.29 and SGLang read only attn_factor and use {own:.6g}. Write attn_factor = {given / own:.6g} too"
        )
    rows = math.ceil(original * factor)
    if original * factor < longest:
        texts.append(
            f"table too short: {original} x {factor:g} gives vLLM cos and sin for {rows} positions, but "
            f"max_position_embeddings lets prompts of {longest} in; beyond the table vLLM from 0.30 computes NaN "
            f"without an error, and older releases take at most {int(original * factor)} tokens"
        )
    if nested and section.get("truncate", True) is False:
        texts.append(
            "truncate nested: transformers 5 does not see truncate inside one layer kind's section and rounds the "
            "ramp, vLLM sees it and does not"
        )
    return texts


def _window_left(config: dict[str, Any], section: Section) -> list[str]:
    longest, original, factor = config["max_position_embeddings"], section.get(ORIGINAL), section.get("factor")
    if not original or not factor or factor <= 1 or longest > original:
        return []
    return [
        f"max_position_embeddings left at native: the section extends to {int(original * factor)} tokens, but vLLM "
        f"from 0.30 and others take prompts of at most {longest}; write {int(original * factor)}"
    ]


def _longrope_traps(section: Section) -> list[str]:
    """Known ways for a longrope section to be read differently."""
    texts = []
    if section.get("short_factor") != section.get("long_factor"):
        texts.append(
            "short_factor and long_factor differ: transformers switches at the original length in every call, vLLM "
            "once by its longest prompt, SGLang by the longest in the batch; keys cached before a switch do not fit"
        )
    if not {"short_mscale", "long_mscale"} <= section.keys():
        texts.append(
            "no short_mscale and long_mscale: vLLM and SGLang do not read attention_factor under longrope and "
            "compute a multiplier from the lengths instead"
        )
    return texts
