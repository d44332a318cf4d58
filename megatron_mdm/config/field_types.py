"""What a field of the schema may hold, told from its annotation: a reader of text needs to know before it converts."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, one by one; anything else by itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in alternatives(part))
    return (annotation,)


def is_free(annotation: Any) -> bool:
    """Whether it admits anything, so that nothing is known."""
    return Any in alternatives(annotation)


def takes_any_text(annotation: Any) -> bool:
    return str in alternatives(annotation) or Path in alternatives(annotation)


def takes_text(annotation: Any) -> bool:
    """Whether it admits any text, or some."""
    return takes_any_text(annotation) or any(isinstance(value, str) for value in _choices(annotation))


def takes_more_than_text(annotation: Any) -> bool:
    """Whether it admits anything but text."""
    members = [member for member in alternatives(annotation) if get_origin(member) is not Literal]
    return bool(members) or not all(isinstance(value, str) for value in _choices(annotation))


def takes_null(annotation: Any) -> bool:
    return type(None) in alternatives(annotation)


def takes_bool(annotation: Any) -> bool:
    return bool in alternatives(annotation)


def takes_whole_numbers(annotation: Any) -> bool:
    return int in alternatives(annotation) or any(isinstance(value, int) for value in _choices(annotation))


def takes_fractions(annotation: Any) -> bool:
    return float in alternatives(annotation)


def takes_lists(annotation: Any) -> bool:
    return any(_is_a(member, Sequence) or _is_a(member, set | frozenset) for member in alternatives(annotation))


def takes_mappings(annotation: Any) -> bool:
    return any(_is_a(member, BaseModel) or _is_a(member, Mapping) for member in alternatives(annotation))


def keys(annotation: Any) -> list[str]:
    """The fields of a section; none of other things."""
    sections = [member for member in alternatives(annotation) if _is_a(member, BaseModel)]
    return [name for section in sections for name in section.model_fields]


def of_key(annotation: Any, key: str) -> Any:
    """What stands under a key: a section's field, or a value of a mapping. Any, where that is not known."""
    for member in alternatives(annotation):
        if _is_a(member, BaseModel) and key in member.model_fields:
            return member.model_fields[key].annotation
        if _is_a(member, Mapping) and len(get_args(member)) == 2:
            return get_args(member)[1]
    return Any


def of_element(annotation: Any, index: int) -> Any:
    """What stands at a place of a list. Any, where that is not known."""
    for member in alternatives(annotation):
        parts = get_args(member)
        if not takes_lists(member) or not parts:
            continue
        if get_origin(member) is tuple and parts[-1] is not Ellipsis:
            return parts[index] if index < len(parts) else Any
        return parts[0]
    return Any


def _choices(annotation: Any) -> list[Any]:
    members = alternatives(annotation)
    return [value for member in members if get_origin(member) is Literal for value in get_args(member)]


def _is_a(member: Any, kind: Any) -> bool:
    found = get_origin(member) or member
    return isinstance(found, type) and issubclass(found, kind) and found is not str
