"""Rules about several keys of a recipe. The range of a single value is annotated beside its field in `schema.py`.

A rule is checked only if all values that it reads are inside their own ranges, so that no rule has to guard against
them. Conditions on the base model are checked where the model is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Generic, TypeVar

from .parsing import show
from .schema import RAMPED, Recipe, Rope

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One condition on a recipe, or on its `rope` section alone."""

    key: str
    """The dotted key that the message names."""
    reads: tuple[str, ...]
    """The other keys whose values the condition reads."""
    holds: Callable[[Subject], bool]
    remedy: str
    """What to write instead; `{r}` is the recipe or section."""


def broken_rules(
    rules: Sequence[Rule[Subject]], subject: Subject, out_of_range: Sequence[str], prefix: str = ""
) -> list[str]:
    """The messages of the rules that do not hold.

    Args:
        rules: rules on `subject`.
        subject: a recipe, or a section of one.
        out_of_range: places of values outside their own range; rules that read these are skipped.
        prefix: what precedes the rules' keys in a place, such as `rope.`.
    """
    problems = []
    for rule in rules:
        read = [prefix + key for key in (rule.key, *rule.reads)]
        if any(_within(bad, key) for bad in out_of_range for key in read) or rule.holds(subject):
            continue
        found = reduce(getattr, rule.key.split("."), subject)
        problems.append(f"{prefix}{rule.key}: {rule.remedy.format(r=subject)}; found {show(found)}")
    return problems


def _within(place: str, key: str) -> bool:
    """Whether a place is the key itself, an item of its list or a key below it."""
    return place == key or place.startswith((f"{key}[", f"{key}."))


def _own_rows(recipe: Recipe) -> bool:
    """Whether every row is a span of its own, not shared by documents."""
    return recipe.data.packing == "long"


def _lengths(recipe: Recipe) -> list[int]:
    """All lengths in which rows are read."""
    return [recipe.row_tokens(), *(recipe.data.lengths or [])]


def _retrieval_lengths(recipe: Recipe) -> list[int]:
    return (recipe.eval.retrieval.lengths if recipe.eval.retrieval else None) or []


ROPE_RULES: list[Rule[Rope]] = [
    Rule(
        "native", ("window",), lambda r: r.native is None or r.native <= r.window,
        "the native window must not exceed rope.window ({r.window}); this tool only extends windows",
    ),
    Rule(
        "beta_fast", ("beta_slow",), lambda r: r.beta_fast > r.beta_slow,
        "must exceed rope.beta_slow ({r.beta_slow}); are the betas swapped?",
    ),
    Rule(
        "init", ("frequencies",), lambda r: r.method in RAMPED or r.frequencies in ("per_pair", "fixed"),
        "the table of this method is no YaRN ramp, which rope.frequencies: {r.frequencies} learns; set it to per_pair "
        "or fixed",
    ),
]  # fmt: skip

_LEARNED: list[Rule[Recipe]] = [
    Rule(
        "rope.frequencies", (),
        lambda r: (
            r.rope.frequencies != "fixed" or r.rope.query_gains != "none" or r.rope.qk_bias or r.lora is not None
        ),
        "with fixed frequencies there is nothing to learn: choose other frequencies, set rope.query_gains or "
        "rope.qk_bias, or add lora",
    ),
]  # fmt: skip

_DATA: list[Rule[Recipe]] = [
    Rule(
        "data.heldout", ("data.train",), lambda r: not {*r.data.train} & {*r.data.heldout},
        "a document of data.train is listed here too, and measurements on training documents are not valid; name other "
        "documents",
    ),
    Rule(
        "data.heldout_unlike", ("data.train", "data.heldout"),
        lambda r: not {*r.data.heldout_unlike} & {*r.data.train, *r.data.heldout},
        "a document of data.train or data.heldout is listed here too; name documents of other authors and genres",
    ),
    Rule(
        "data.validation", ("data.train", "data.heldout"),
        lambda r: not {*(r.data.validation or [])} & {*r.data.train, *r.data.heldout, *r.data.heldout_unlike},
        "a document of data.train, data.heldout or data.heldout_unlike is listed here too; name other documents",
    ),
    Rule(
        "data.validation", (), lambda r: r.data.validation is None or r.train.decide,
        "only train.decide reads validation documents; set it to true",
    ),
    Rule(
        "data.row_tokens", ("rope.window",), lambda r: r.row_tokens() <= r.rope.window,
        "a row cannot be longer than rope.window ({r.rope.window})",
    ),
    Rule(
        "data.needles", (), lambda r: r.data.needles == 0 or _own_rows(r),
        "questions are planted only in rows that documents do not share; set data.packing to long",
    ),
    Rule(
        "data.lengths", ("data.row_tokens", "rope.window"),
        lambda r: all(r.row_tokens() % length == 0 for length in r.data.lengths or []),
        "every length must divide the tokens of a row (data.row_tokens, by default rope.window)",
    ),
    Rule(
        "data.lengths", (), lambda r: r.data.lengths is None or _own_rows(r),
        "only rows that documents do not share can be cut; set data.packing to long",
    ),
    Rule(
        "data.packing", ("train.short_context_kl",), lambda r: _own_rows(r) or not r.train.compares_with_base,
        "this train.objective or train.short_context_kl compares with the base, which reads only rows that documents "
        "do not share; set data.packing to long",
    ),
]  # fmt: skip

_TRAIN: list[Rule[Recipe]] = [
    Rule(
        "train.micro_batch_size", ("train.batch_size",),
        lambda r: r.train.batch_size % r.train.micro_batch_size == 0,
        "must divide train.batch_size ({r.train.batch_size})",
    ),
    Rule(
        "train.keep_attention", (), lambda r: r.train.gradient_checkpointing or not r.train.keep_attention,
        "applies to checkpointed layers only; set train.gradient_checkpointing to true",
    ),
    Rule(
        "train.offload_activations", (), lambda r: r.train.gradient_checkpointing or not r.train.offload_activations,
        "moves the inputs of checkpointed layers only; set train.gradient_checkpointing to true",
    ),
]  # fmt: skip

_EVAL: list[Rule[Recipe]] = [
    Rule(
        "eval.lengths", ("rope.window",), lambda r: all(n <= r.rope.window for n in r.eval.lengths or []),
        "a length must not exceed rope.window ({r.rope.window})",
    ),
    Rule(
        "eval.retrieval.lengths", ("rope.window",), lambda r: all(n <= r.rope.window for n in _retrieval_lengths(r)),
        "a length must not exceed rope.window ({r.rope.window})",
    ),
]  # fmt: skip

_RUNTIME: list[Rule[Recipe]] = [
    Rule(
        "runtime.fsdp", (), lambda r: not (r.runtime.fsdp and r.runtime.zero == 3),
        "runtime.zero: 3 shards the weights already; choose one of the two",
    ),
    Rule(
        "runtime.offload", (), lambda r: r.runtime.offload == "none" or r.sharded(),
        "only sharded weights can be kept in CPU memory; set runtime.zero to 3, or runtime.fsdp to true",
    ),
    Rule(
        "runtime.sequence", ("runtime.processes",),
        lambda r: r.runtime.processes is None or r.runtime.processes % r.runtime.sequence == 0,
        "must divide runtime.processes ({r.runtime.processes})",
    ),
    Rule(
        "runtime.sequence", ("data.row_tokens", "data.lengths", "rope.window"),
        lambda r: all(length % r.runtime.sequence == 0 for length in _lengths(r)),
        "must divide every length in which rows are read (data.row_tokens, by default rope.window, and data.lengths)",
    ),
    Rule(
        "runtime.sequence", ("train.short_context_kl",),
        lambda r: r.runtime.sequence == 1 or not r.train.compares_with_base,
        "the base cannot read a part of a row: set train.objective to next-token and train.short_context_kl to 0",
    ),
    Rule(
        "runtime.sequence", (), lambda r: r.runtime.sequence == 1 or _own_rows(r),
        "attention over split rows cannot keep documents apart; set data.packing to long",
    ),
]  # fmt: skip

RULES: list[Rule[Recipe]] = [*_LEARNED, *_DATA, *_TRAIN, *_EVAL, *_RUNTIME]
"""The rules on a whole recipe; those on its `rope` section are `ROPE_RULES`."""
