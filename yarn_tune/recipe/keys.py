"""The list of all recipe keys: dotted name, type and default."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Annotated, Any, Literal, get_args, get_origin

from .parsing import section_of
from .schema import Recipe


@dataclasses.dataclass(frozen=True)
class Key:
    """One recipe key.

    Attributes:
        name: dotted, as in `train.steps`.
        type: the accepted type, as in `int | null` or `next-token | distill`.
        default: as YAML would show it; `required` if there is none.
    """

    name: str
    type: str
    default: str


def recipe_keys() -> list[Key]:
    """Return every key that a recipe may have, in the order of the sections."""
    return list(_keys(Recipe, ""))


def _keys(cls: Any, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        section = section_of(hint)
        if section is not hint:  # a section that may also be a number or null is a key of its own
            yield Key(name, _type(hint), _default(field))
        if section is not None:
            yield from _keys(section, f"{name}.")


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = " and ".join(each.text for each in arguments[1:] if not isinstance(each, str))
        return f"{_type(arguments[0])} (must {ranges})" if ranges else _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"[{_type(arguments[0])}]"
    if dataclasses.is_dataclass(hint):
        return "section"
    return "null" if hint is type(None) else str(hint.__name__)


def _default(field: "dataclasses.Field[Any]") -> str:
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    if default is MISSING:
        return "required"
    if dataclasses.is_dataclass(default):
        return "as listed"
    return {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
