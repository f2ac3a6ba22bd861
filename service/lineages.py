"""What made a stored vector, as JSON will have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from gallery.lineage import Step


class LineageStep(BaseModel):
    """One transformation on the way from the vector that a model made."""

    transformation: str
    artifact_sha256: str
    source_model: str = Field(description="The model whose column it was applied to.")
    source_origin: Literal["native", "derived"] = Field(description="Whether that column was native or derived.")
    computed_in: str = Field(description="The number type that it was computed in: `float32` or `bfloat16`.")


def steps(lineage: Sequence[Step]) -> list[LineageStep]:
    return [
        LineageStep(
            transformation=step.transformation,
            artifact_sha256=step.artifact,
            source_model=step.source,
            source_origin="derived" if at else "native",
            computed_in=step.computed_in,
        )
        for at, step in enumerate(lineage)
    ]
