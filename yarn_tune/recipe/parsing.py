"""Build frozen dataclasses from nested mappings, and collect every problem instead of stopping at the first.

A problem is one line: the place (dotted key), what is wrong, and the value found or the remedy. Types and ranges are
read from the annotations of the dataclass fields.
"""

import dataclasses
import difflib
import itertools
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from .ranges import Bound, Constraint


@dataclass
class Findings:
    """The problems found while one recipe is read."""

    problems: list[str] = field(default_factory=list)
    out_of_range: list[str] = field(default_factory=list)
    """Places of values that have the right type and are outside their range. All other problems leave no value."""

    @property
    def unusable(self) -> int:
        """How many problems leave a field without a value."""
        return len(self.problems) - len(self.out_of_range)


MOST_NODES = 100_000
"""Most values in a YAML text, with every alias expanded."""


def read_yaml(text: str, strict: bool = True) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        strict: whether to refuse a key that is given twice, of which YAML readers keep the last, and numbers in base 8
            or 60, as YAML 1.1 reads `017` and `1:30`.

    Raises:
        yaml.YAMLError: if it is not YAML, nested too deeply, or grows beyond `MOST_NODES` values through aliases.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _size(root, {}) > MOST_NODES:
            raise yaml.YAMLError(f"its aliases expand to more than {MOST_NODES:,} values")
        if root is not None and strict:
            _check(root, set())
        return yaml.safe_load(text)
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, a date that does not exist
        raise yaml.YAMLError(str(error).split(";")[0]) from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply, or within itself") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below a node, with every alias expanded."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # until it is counted, so that a node that contains itself ends
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = itertools.chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in children)
        known[id(node)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(node)]


def _check(node: yaml.Node, known: set[int]) -> None:
    """Check a node and all below it for what `strict` refuses; raises yaml.YAMLError."""
    if isinstance(node, yaml.ScalarNode):
        _check_number(node)
    if id(node) in known or not isinstance(node, yaml.CollectionNode):
        return
    known.add(id(node))
    lines: dict[str, int] = {}
    for child in node.value:
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"line {line}: {show(key.value)} was given before, in line {lines[key.value]}")
            lines[key.value] = line
        _check(value, known)


def _check_number(node: yaml.ScalarNode) -> None:
    """Check that YAML 1.1 does not read a number in base 8 or 60; raises yaml.YAMLError."""
    octal = node.tag.endswith(":int") and re.fullmatch(r"[-+]?0[0-7_]+", node.value)
    sexagesimal = node.tag.endswith((":int", ":float")) and ":" in node.value
    if octal or sexagesimal:
        number, base, line = yaml.safe_load(node.value), 8 if octal else 60, node.start_mark.line + 1
        raise yaml.YAMLError(
            f"line {line}: {show(node.value)} is {number} in YAML 1.1, in base {base}; write the number in base 10, or "
            "text in quotes"
        )


def apply_override(tree: dict[str, Any], override: str, findings: Findings) -> None:
    """Set one dotted key of `tree` from a string such as `train.steps=50`; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        findings.problems.append(f"override {show(override)}: write it as section.key=value, as in train.steps=50")
        return
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:300]
        findings.problems.append(f"override {show(override)}: the value is not readable as YAML: {reason}")
        return
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[leaf] = value


def build(cls: Any, tree: Any, place: str, findings: Findings) -> Any:
    """An instance of the dataclass `cls` from a mapping; None if a value is missing, unknown or of another type.

    Values outside their range are reported too, but do not prevent the instance: rules about several keys can then be
    checked in the same pass.
    """
    before = findings.unusable
    if not isinstance(tree, dict):
        findings.problems.append(f"{place}: must be a mapping; found {show(tree)}")
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            close = _in_sections(hints, key) or difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            findings.problems.append(f"{_join(place, key)}: unknown key; {remedy}")
    values = {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], _join(place, name), findings)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            findings.problems.append(f"{_join(place, name)}: missing; this key has no default")
    return cls(**values) if findings.unusable == before else None


def _in_sections(hints: dict[str, Any], key: object) -> list[str]:
    """Dotted names of the fields called `key` in the sections of a mapping, for a key given without its section."""
    return [
        f"{name}.{key}"
        for name, hint in hints.items()
        if (section := section_of(hint)) is not None and key in {field.name for field in dataclasses.fields(section)}
    ]


def section_of(hint: Any) -> type[Any] | None:
    """The dataclass among the types that a field accepts, or None if it holds plain values only."""
    if isinstance(hint, type):
        return hint if dataclasses.is_dataclass(hint) else None
    inside = (section_of(each) for each in get_args(hint) if isinstance(each, type) or get_args(each))
    return next((section for section in inside if section is not None), None)


def _convert(hint: Any, value: Any, place: str, findings: Findings) -> Any:
    """`value` as the type `hint`; adds a problem if it has another type or is outside the annotated range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:], value, place, findings)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        if isinstance(value, dict):
            choices = [a for a in choices if dataclasses.is_dataclass(a)] or choices
        else:
            choices = [a for a in choices if not dataclasses.is_dataclass(a)] or choices
        return _convert(choices[0], value, place, findings)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, place, findings)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            options = ", ".join(map(str, arguments))
            findings.problems.append(f"{place}: must be one of {options}; found {show(value)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            findings.problems.append(f"{place}: must be a list, as in [{_example(arguments[0])}]; found {show(value)}")
            return []
        return [_convert(arguments[0], item, f"{place}[{i}]", findings) for i, item in enumerate(value)]
    return _plain(hint, value, place, findings)


def _annotated(hint: Any, notes: tuple[Any, ...], value: Any, place: str, findings: Findings) -> Any:
    """`_convert` for `Annotated[hint, *notes]`: the notes are constraints and, as strings, reasons for them."""
    before, unusable = len(findings.problems), findings.unusable
    value = _convert(hint, value, place, findings)
    constraints: list[Constraint] = [note for note in notes if not isinstance(note, str)]
    if findings.unusable == unusable and not all(each.holds(value) for each in constraints):
        named = [each for each in constraints if not isinstance(each, Bound) or not each.holds(value)]
        conditions = " and ".join(each.text for each in named).replace(" and be ", " and ")
        findings.problems.append(f"{place}: must {conditions}; found {show(value)}")
        findings.out_of_range.append(place)
    reasons = "".join(f" ({note})" for note in notes if isinstance(note, str))
    findings.problems[before:] = [problem + reasons for problem in findings.problems[before:]]
    return value


def _plain(hint: Any, value: Any, place: str, findings: Findings) -> Any:
    """A bool, int, float or str. YAML reads 1e-3 as a string, which is converted to the number."""
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            pass
    finite = not isinstance(value, float) or abs(value) < float("inf")
    if type(value) is not hint or not finite:
        kind = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[hint]
        findings.problems.append(f"{place}: must be {kind}; found {show(value)}")
    return value


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def show(value: Any) -> str:
    """A value as printed in messages, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _example(hint: Any) -> str:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    options = get_args(hint)
    return str(options[0]) if options else {int: "1024", float: "0.5", str: "a.txt"}.get(hint, "...")
