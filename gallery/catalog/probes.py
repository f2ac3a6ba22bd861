"""Rows of probes: the queries by which an upgrade of a gallery is judged."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery.arrays import Vectors
from gallery.catalog.tables import ProbeRow


def of_gallery(session: Session, gallery_id: int) -> list[ProbeRow]:
    """The probe queries of a gallery."""
    return list(session.scalars(select(ProbeRow).where(ProbeRow.gallery_id == gallery_id).order_by(ProbeRow.position)))


def replace(
    session: Session, gallery_id: int, probes: Sequence[tuple[Mapping[str, Vectors], Sequence[str] | None]]
) -> None:
    """Replace a gallery's probes: per probe its vector in each model, and the relevant ids if known.

    The caller has locked the gallery's row: of two that replace probes at once, one would fail.
    """
    for row in of_gallery(session, gallery_id):
        session.delete(row)
    session.flush()
    session.add_all(
        ProbeRow(
            gallery_id=gallery_id,
            position=at,
            vectors={
                name: base64.b64encode(vector.astype("<f4").tobytes()).decode() for name, vector in embedded.items()
            },
            relevant=list(relevant) if relevant is not None else None,
        )
        for at, (embedded, relevant) in enumerate(probes)
    )
    session.flush()


def vectors(probes: Sequence[ProbeRow], model: str) -> Vectors:
    """The vectors that probes have in a model, row by row; each of them has one."""
    return np.stack([np.frombuffer(base64.b64decode(probe.vectors[model]), dtype="<f4") for probe in probes])
