"""Comparison of the RoPE that a stack computes with the RoPE that it must compute, and of files with their digests."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import CARD, CHECKSUM, CHECKSUMS, file_digest, read_checked, read_json
from ..models import FULL, language_model, layout_of, text_section
from ..rope import default_inv_freq
from ..tunable import Learned
from .readers import EffectiveRope
from .rules import default_section
from .tables import Table

FREQUENCY_TOLERANCE, MULTIPLIER_TOLERANCE = 1e-5, 1e-6
"""Largest relative error of frequencies, and of the multiplier of cos and sin, that counts as equal."""


@dataclass(frozen=True)
class ExpectedRope:
    """The RoPE that a stack must compute."""

    tables: dict[str, list[tuple[Tensor, float]]]
    """Kind of layer -> frequencies and multiplier of cos and sin (including the fold), for short prompts and, if they
    differ, for long ones."""
    window: int
    softmax_gain: float = 1.0
    """Multiplier of all logits of latent attention, as in the base."""
    query_growth: tuple[float, int] | None = None
    """Growth of queries with the position, as in `EffectiveRope`."""
    fold: float = 1.0
    """Multiplier of logits that is in the weights of the tuned layers, in addition to the stack's own multiplier."""
    qk_bias: bool = False
    """Whether biases of queries and keys were learned."""

    def pairs(self, kind: str, found: tuple[Table, ...]) -> list[tuple[Table, tuple[Tensor, float]]]:
        """Each of a stack's tables with the expected table for prompts of that length."""
        expected = self.tables[kind]
        if len(found) == 1:
            return [(found[0], one) for one in expected]
        return list(zip(found, [expected[0], expected[-1]], strict=True))


def mismatches(found: EffectiveRope, wanted: ExpectedRope) -> list[str]:
    """The differences between what a stack computes and what it must compute; empty if there are none."""
    if found.state != "read":
        return [f"{found.state}: {found.reason}"]
    problems = []
    for kind in wanted.tables:
        own_fold = wanted.fold if kind in ("", FULL) else 1.0
        for table, (inv_freq, multiplier) in wanted.pairs(kind, found.tables[kind]):
            where = f" in {kind} layers" if kind else ""
            where += f" beyond {table.above} tokens" if table.above else ""
            error = frequency_error(table.inv_freq, inv_freq)
            if error > FREQUENCY_TOLERANCE:
                problems.append(f"frequencies off by {error:.1e} (relative){where}")
            total = table.multiplier * math.sqrt(own_fold)
            if abs(total / multiplier - 1) > MULTIPLIER_TOLERANCE:
                problems.append(f"multiplies cos and sin by {total:.6g} instead of {multiplier:.6g}{where}")
    if abs(found.softmax_gain / wanted.softmax_gain - 1) > MULTIPLIER_TOLERANCE:
        problems.append(f"multiplies all logits by {found.softmax_gain:.6g} instead of {wanted.softmax_gain:.6g}")
    if found.query_growth != wanted.query_growth:
        problems.append(f"{_growth(found.query_growth)} instead of {_growth(wanted.query_growth)}")
    if wanted.qk_bias and not found.qk_bias:
        problems.append("is not known to read biases of queries and keys in this family, and may drop them")
    if found.window < wanted.window:
        problems.append(f"takes prompts of at most {found.window} tokens instead of {wanted.window}")
    if found.rows is not None and found.rows < found.window:
        problems.append(
            f"holds cos and sin for {found.rows} positions but takes prompts of {found.window}: NaN beyond them"
        )
    return list(dict.fromkeys(problems))


def _growth(growth: tuple[float, int] | None) -> str:
    if growth is None:
        return "multiplies no queries by their position"
    beta, original = growth
    return f"multiplies queries by 1 + {beta:g} ln(1 + floor(position / {original}))"


def frequency_error(found: Tensor, wanted: Tensor) -> float:
    """Largest relative difference; infinite where the numbers of pairs differ.

    Pairs of frequency 0 at the end of a table (rope_type proportional) are not counted: they are not rotated.
    """
    found, wanted = (table[: int(table.count_nonzero())] if table[-1] == 0 else table for table in (found, wanted))
    if found.shape != wanted.shape:
        return math.inf
    error = (found.double() / wanted.double() - 1).abs()
    return error[found != wanted].max().item() if (found != wanted).any() else 0.0


def expected_rope(learned: Learned, base: dict[str, Any], fold: float = 1.0) -> ExpectedRope:
    """What every stack must compute for these numbers."""
    layout, base = layout_of(base), text_section(base)
    tuned = (learned.inv_freq(), learned.attention_factor)
    biased = any(each.kind == "bias" for each in learned.folds)
    if not layout.nested:
        facts = learned.facts
        return ExpectedRope(
            {"": [tuned]}, learned.window, facts.softmax_gain, facts.query_growth, fold=fold, qk_bias=biased
        )
    sections = {k: default_section(base, layout.thetas[k], k) for k in layout.kinds if k != FULL}
    dims = {k: layout.rotary_dim(s.get("partial_rotary_factor", 1.0)) for k, s in sections.items()}
    others = {k: [(default_inv_freq(s["rope_theta"], dims[k]), 1.0)] for k, s in sections.items()}
    return ExpectedRope({FULL: [tuned]} | others, learned.window, fold=fold, qk_bias=biased)


def read_fidelity(checkpoint: str) -> dict[str, Any] | None:
    """fidelity.json of an export; None elsewhere.

    Version 0.1.0 wrote no checksums. What its exports compute is read from their config alone, like a foreign one's.
    """
    path, remedy = Path(checkpoint) / "fidelity.json", "run `yarn-tune export` again"
    found = read_json(path, remedy) if path.is_file() else None
    return read_checked(path, remedy) if isinstance(found, dict) and CHECKSUM in found else None


def folded_kinds(fidelity: dict[str, Any] | None) -> list[str]:
    """Kinds of learned numbers that were folded into the weights of an export."""
    return list((fidelity or {}).get("learned", {}).get("folds", ()))


def stock_rope(found: EffectiveRope) -> ExpectedRope:
    """What a stack computes, as what others must compute."""
    tables = {kind: [(t.inv_freq, t.multiplier) for t in regimes] for kind, regimes in found.tables.items()}
    return ExpectedRope(tables, found.window, found.softmax_gain, found.query_growth)


def learned_rope(fidelity: dict[str, Any], config: dict[str, Any], stock: EffectiveRope) -> ExpectedRope:
    """The learned table in the tuned layers, and the stock one in the others."""
    kind = FULL if language_model(config)[1].nested else ""
    tuned = (torch.tensor(fidelity["inv_freq"]), float(fidelity["attention_factor"]))
    others = {k: (tables[-1].inv_freq, tables[-1].multiplier) for k, tables in stock.tables.items() if k != kind}
    return ExpectedRope(
        {kind: [tuned]} | {k: [t] for k, t in others.items()},
        fidelity["window"],
        fidelity.get("softmax_gain", 1.0),
        stock.query_growth,
        float(fidelity.get("fold", {}).get("gain", 1.0)),
        "bias" in folded_kinds(fidelity),
    )


def changed_files(folder: Path) -> tuple[list[str], list[str]]:
    """(problems, notes): the files of an export that changed since it was written, in words.

    A changed model card is a note. Both are empty for a checkpoint of another tool.

    Raises:
        UserError: if the export's own list of checksums is damaged.
    """
    path = folder / CHECKSUMS
    problems: list[str] = []
    notes: list[str] = []
    if not path.is_file():
        return problems, notes
    remedy = "run `yarn-tune export` again"
    listed = read_json(path, remedy)
    if not (isinstance(listed, dict) and {"files", CHECKSUM} & {*listed}):
        return problems, notes  # of another tool; damage to one bit would leave one of the two keys
    for name, digest in read_checked(path, remedy)["files"].items():
        found = notes if name == CARD else problems
        try:
            if file_digest(folder / name) != digest:
                found.append(f"{name}: changed since it was exported")
        except OSError as error:
            found.append(f"{name}: cannot be read ({error.strerror})")
    return problems, notes
