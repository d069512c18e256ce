"""Nested mappings to frozen dataclasses, with every problem reported rather than the first.

A problem is one line: the place (dotted key), what is wrong, and the value found or the remedy.
"""

import dataclasses
import difflib
import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml


def apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set one dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r}: write it as section.key=value, as in train.steps=50")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"override {override!r}: the value is not readable as YAML")
        return
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[leaf] = value


def build(cls: Any, tree: Any, place: str, problems: list[str]) -> Any:
    """One dataclass from one mapping, or None with the problems appended."""
    before = len(problems)
    if not isinstance(tree, dict):
        problems.append(f"{place}: expected a mapping, found {show(tree)}")
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            problems.append(f"{_join(place, key)}: unknown key; {remedy}")
    values = {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], _join(place, name), problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(place, name)}: missing; it has no default")
    return cls(**values) if len(problems) == before else None


def _convert(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    """`value` as the type `hint` asks for; appends a problem if it is not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:  # with the reason why other values are not accepted
        before = len(problems)
        value = _convert(arguments[0], value, place, problems)
        problems[before:] = [f"{problem} ({arguments[1]})" for problem in problems[before:]]
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        if isinstance(value, dict):
            choices = [a for a in choices if dataclasses.is_dataclass(a)] or choices
        else:
            choices = [a for a in choices if not dataclasses.is_dataclass(a)] or choices
        return _convert(choices[0], value, place, problems)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, place, problems)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            problems.append(f"{place}: must be one of {', '.join(map(str, arguments))}; found {show(value)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            problems.append(f"{place}: must be a list, as in [{_example(arguments[0])}]; found {show(value)}")
            return []
        return [_convert(arguments[0], item, f"{place}[{i}]", problems) for i, item in enumerate(value)]
    return _plain(hint, value, place, problems)


def _plain(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    """A bool, int, float or str. YAML reads 1e-3 as a string, which is taken for the number it means."""
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    finite = not isinstance(value, float) or abs(value) < float("inf")
    if type(value) is not hint or not finite:
        kind = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[hint]
        problems.append(f"{place}: must be {kind}; found {show(value)}")
    return value


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def show(value: Any) -> str:
    """A value as a message shows it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _example(hint: Any) -> str:
    options = get_args(hint)
    return str(options[0]) if options else {int: "1024", str: "a.txt"}.get(hint, "...")
