"""The types that the client gives to its users say what the service's documents say."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel

from forwardfill import answers
from service import upgrade_documents
from service.api import search

TYPES = [name for name, kind in vars(answers).items() if is_typeddict(kind)]
OTHERWISE_NAMED: dict[str, type[BaseModel]] = {"Hit": search.Found, "Answer": search.SearchAnswer}


def document(name: str) -> type[BaseModel]:
    found = OTHERWISE_NAMED.get(name) or getattr(search, name, None) or getattr(upgrade_documents, name)
    assert issubclass(found, BaseModel)
    return found


def as_json(kind: Any) -> Any:
    """What JSON has of a type, whether a program calls it by a typed dictionary or by a model, an enumeration or its words."""
    if is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        hints = get_type_hints(kind)
        return {name: as_json(hints[name]) for name in getattr(kind, "model_fields", hints)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {each.value for each in kind}
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return [as_json(each) for each in sorted(get_args(kind), key=str)]
    if get_origin(kind) is not None:
        return (get_origin(kind), *map(as_json, get_args(kind)))
    return str if kind is datetime else kind


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_the_fields_of_the_services_document(name: str) -> None:
    assert as_json(getattr(answers, name)) == as_json(document(name))


@pytest.mark.parametrize("name", TYPES)
def test_what_may_be_missing_has_a_default_in_the_document(name: str) -> None:
    optional = getattr(answers, name).__optional_keys__
    assert not any(field.is_required() for key, field in document(name).model_fields.items() if key in optional)
