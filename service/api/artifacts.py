"""Artifacts: uploaded, judged and stored."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from gallery import errors
from gallery.catalog import audit, claims
from gallery.catalog import models as model_rows
from gallery.catalog.tables import ArtifactRow
from gallery.files import adopt
from gallery.transforms import artifact_file
from service import uploads
from service.auth import MayAdmin
from service.documents import documented
from service.process import Process, ProcessDep, once_more

router = APIRouter()

Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, in lowercase hexadecimal.")]


class Artifact(BaseModel):
    """A stored artifact."""

    sha256: str
    bytes: int
    architecture: dict[str, Any]
    created_at: datetime


_SAFETENSORS = {
    "application/octet-stream": {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "A safetensors file whose metadata declares a `format` and an `architecture` of the closed list.",
        },
        "example": "(binary) weight: float32 (128, 512), bias: float32 (128); metadata: format=forwardfill.transformation/1, "
        'architecture={"kind": "linear", "source_dimension": 512, "target_dimension": 128}',
    }
}


@router.put(
    "/artifacts/{sha256}",
    status_code=201,
    tags=["transformations"],
    **documented(
        errors.DigestMismatch,
        errors.UnsafeArtifact,
        already=Artifact,
        other_content=_SAFETENSORS,
    ),
)
async def put_artifact(
    caller: MayAdmin, sha256: Sha256, request: Request, process: ProcessDep, response: Response
) -> Artifact:
    """Store a safetensors file of a declared architecture under its digest. 200 if it is there already.

    The file is not trusted: nothing is unpickled, and its tensors must be exactly those that its architecture
    implies. The media type is ignored.
    """
    async with uploads.spooled(request, process, process.settings.max_artifact_bytes, "max_artifact_bytes") as upload:
        if upload.sha256 != sha256:
            raise errors.DigestMismatch(f"the body's SHA-256 is {upload.sha256}, not {sha256}", sha256=upload.sha256)
        async with process.requests.taken():
            architecture = await run_in_threadpool(uploads.judged, upload.path)
            created, artifact = await run_in_threadpool(_keep, process, upload, architecture, caller.name)
    response.status_code = 201 if created else 200
    return artifact


def _keep(
    process: Process, upload: uploads.Upload, architecture: dict[str, Any], actor: str | None
) -> tuple[bool, Artifact]:
    """The file first, then the row that names it."""
    name = artifact_file(upload.sha256)
    adopt(process.store.files, upload.path, name, upload.sha256)

    def write() -> tuple[bool, Artifact]:
        with process.store.catalog.transaction() as tx:
            claims.hold(tx.session)
            process.store.files.claim([name])
            created = model_rows.add_artifact(tx.session, upload.sha256, size=upload.size, architecture=architecture)
            if created:
                audit.record(tx.session, "artifact.stored", actor=actor, artifact=upload.sha256)
            row = tx.session.get_one(ArtifactRow, upload.sha256)
            return created, Artifact.model_validate(row, from_attributes=True)

    return once_more(write)
