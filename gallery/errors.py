"""Everything that can be refused, drawn as a tree. No HTTP here: the service gives each its status in one table.

GalleryError
  x NotFound
      ModelNotFound, TransformationNotFound, ArtifactNotFound, GalleryNotFound, ItemNotFound, UpgradeNotFound, FitNotFound,
      KeyNotFound
  x Conflict
      ModelExists, TransformationExists, GalleryExists, KeyExists
      NoRoute, ModelRetired
      UpgradeInProgress, InvalidStateTransition, NativeItemsWouldBeUnreachable, GateClosed
  x Invalid
      InvalidVector, DimensionMismatch, DuplicateId, InvalidItem, InvalidFilter, InvalidIndex
      MissingSideInformation
      DigestMismatch, UnsafeArtifact
      WrongTransformation, SameModel, UnusablePairs, IdempotencyKeyReused
      LimitExceeded
  x Damaged, TooManyFiles
  x Outdated
  x LeaseLost
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class GalleryError(Exception):
    """Something was refused. The message is for people, `code` for programs."""

    def __init__(self, message: str, *, pointer: str | None = None, **details: Any) -> None:
        """Say what was refused.

        Args:
            message: what is wrong and what would mend it.
            pointer: JSON pointer to the offending part of the request body, if there is one.
            details: extension members for the answer, such as `allowed=[...]`.
        """
        super().__init__(message)
        self.pointer = pointer
        self.details: Mapping[str, Any] = details

    @property
    def code(self) -> str:
        """The class's name in snake_case; stable."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class NotFound(GalleryError):
    """A named thing does not exist."""


class ModelNotFound(NotFound):
    """No model of this name is registered."""


class TransformationNotFound(NotFound):
    """No transformation of this name is registered."""


class ArtifactNotFound(NotFound):
    """No artifact with this digest was uploaded."""


class GalleryNotFound(NotFound):
    """No gallery has this name."""


class ItemNotFound(NotFound):
    """No live item of the gallery has this id."""


class UpgradeNotFound(NotFound):
    """No upgrade has this id."""


class FitNotFound(NotFound):
    """No fit has this id."""


class KeyNotFound(NotFound):
    """No API key has this name."""


class Conflict(GalleryError):
    """The request is well formed, but the present state does not allow it."""


class ModelExists(Conflict):
    """Another definition is registered under the name."""


class TransformationExists(Conflict):
    """Another transformation is registered under the name."""


class GalleryExists(Conflict):
    """Another gallery has the name."""


class KeyExists(Conflict):
    """Another API key has the name."""


class NoRoute(Conflict):
    """No score space reaches every segment for this query, or no model of the gallery takes this vector."""


class ModelRetired(Conflict):
    """The gallery was upgraded away from this model, and the upgrade is finalized."""


class UpgradeInProgress(Conflict):
    """The gallery has an upgrade that is not finished."""


class InvalidStateTransition(Conflict):
    """The upgrade's state does not allow the verb; `allowed` names the verbs that it does allow."""


class NativeItemsWouldBeUnreachable(Conflict):
    """Items that came natively in the target model would not answer source-model queries."""


class GateClosed(Conflict):
    """The upgraded columns were measured, and they miss a limit of the upgrade's gate."""


class Invalid(GalleryError):
    """The request can never succeed as it stands."""


class InvalidVector(Invalid):
    """A vector holds NaN or infinity, or is zero where the metric is cosine."""


class DimensionMismatch(Invalid):
    """A vector's width is not that of its model."""


class DuplicateId(Invalid):
    """An id occurs twice in one request."""


class InvalidItem(Invalid):
    """An item's id or payload cannot be stored."""


class InvalidFilter(Invalid):
    """A filter uses an unknown operator or an operand of the wrong type."""


class InvalidIndex(Invalid):
    """Index settings name an unknown kind or parameter."""


class MissingSideInformation(Invalid):
    """The transformation needs side-information that items do not have."""


class DigestMismatch(Invalid):
    """The bytes that arrived do not have the digest that was announced."""


class UnsafeArtifact(Invalid):
    """The file is not a well-formed safetensors file of a declared architecture."""


class WrongTransformation(Invalid):
    """The transformation maps between other models, in the other direction, or cannot do what the upgrade asks of it."""


class SameModel(Invalid):
    """The upgrade's target is the model that the gallery has."""


class UnusablePairs(Invalid):
    """No transformation can be fitted to these pairs as was asked."""


class IdempotencyKeyReused(Invalid):
    """The idempotency key was used before with another request."""


class LimitExceeded(Invalid):
    """A published limit was passed."""


class Damaged(GalleryError):
    """Stored bytes do not have their recorded digest."""


class TooManyFiles(GalleryError):
    """Stored files may be whole, but none can be opened: this process, or its host, has as many open as it may."""


class Outdated(GalleryError):
    """What a search began with is gone from the catalog, because it was held up for very long; begin it again."""


class LeaseLost(GalleryError):
    """Another worker holds the segment now, or the upgrade no longer wants it; the work is discarded."""


def pointer(*parts: int | str) -> str:
    """A JSON pointer (RFC 6901), of the names and positions that lead to a part of a body."""
    return "".join("/" + escaped(str(part)) for part in parts)


def escaped(name: str) -> str:
    """A name as a JSON pointer has it."""
    return name.replace("~", "~0").replace("/", "~1")
