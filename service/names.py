"""What a thing may be named."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic import WithJsonSchema as JsonSchema
from pydantic_core import PydanticCustomError

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_NAMED = re.compile(NAME)


def _named(value: str) -> str:
    if _NAMED.fullmatch(value) is None:
        raise PydanticCustomError(
            "invalid_name",
            "a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', and begins with a letter or a digit",
        )
    return value


def _not_a_list(value: str) -> str:
    if value == "fits":
        raise ValueError("`fits` is where fits are listed; choose another name")
    return value


#: the name of something that is made
Name = Annotated[str, AfterValidator(_named), JsonSchema({"type": "string", "pattern": NAME})]
#: of a transformation: `/transformations/fits` lists what is being fitted
TransformationName = Annotated[Name, AfterValidator(_not_a_list)]
