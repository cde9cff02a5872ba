"""The registry over HTTP: upload, list, show, download, delete."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeAlias

from fastapi import APIRouter, Depends, Request
from pydantic import JsonValue
from starlette.responses import JSONResponse, Response

from interventions.artifact import Artifact, read_artifact
from interventions.catalogue import DIGEST_PREFIX, Entry
from interventions.compatibility import (
    IncompatibleArtifactError,
    check_shapes,
    unservable_reason,
)
from interventions.errors import InvalidNameError, UnknownInterventionError
from interventions.header import ArtifactError, ArtifactLimits, UnreadableArtifactError
from interventions.layout import shapes_of
from interventions.staged_upload import StagedUpload
from server.api.auth import require_admin
from server.api.context import Context, ServerContext
from server.api.documentation import upload_body
from server.api.download import open_download
from server.api.errors import from_registry, invalid, unreadable_upload
from server.api.upload import receive_upload
from server.own_thread import in_own_thread

Json: TypeAlias = dict[str, JsonValue]
SHOWN: Final = (*("kind", "method", "description", "license", "base_model", "defaults", "limits"),)

router = APIRouter(prefix="/interventions")


@router.post(
    "",
    summary="Upload an artifact",
    dependencies=[Depends(require_admin)],
    openapi_extra=upload_body(),
)
async def upload(request: Request, context: Context) -> Response:
    """Store an artifact under a name: the form's `name`, or else the one in its manifest.

    The status is 201, or 200 if the name already points to the same bytes. Nothing is stored
    unless the artifact passes every check and fits the loaded model. If it edits sites that the
    engine did not prepare when it started, it is stored, and the answer says what would serve it.
    """
    settings = context.settings
    disk = context.disk
    async with disk.staged(context.registry) as staged:

        async def write(data: bytes) -> None:
            await disk.call(staged.write, data)

        name = await receive_upload(request, write, settings.max_artifact_bytes)
        artifact, warnings, reason = await asyncio.wrap_future(
            in_own_thread(partial(_read, staged, context))
        )
        chosen = artifact.manifest.name if name is None else name
        with _name_errors():
            entry, changed = await disk.call(context.registry.commit, staged, artifact, chosen)
    headers = {"Location": f"{settings.root_path}/v1/interventions/{entry.name}"}
    return JSONResponse(_summary(entry, warnings, reason), 201 if changed else 200, headers=headers)


@router.get("", summary="List the interventions")
async def list_interventions(context: Context) -> Response:
    """List all interventions, also those that cannot be served."""
    data: list[JsonValue] = [_describe(entry, context) for entry in context.registry.entries()]
    return JSONResponse({"object": "list", "data": data})


@router.get("/{reference}", summary="Show an intervention")
async def show(reference: str, context: Context) -> Response:
    """Show one intervention, by its name or as `sha256:<digest>`, with its history."""
    with _name_errors():
        entry = context.registry.resolve(reference)
    history: list[JsonValue] = [
        {"event": version.event, "digest": version.digest or None, "at": version.at.isoformat()}
        for version in entry.history
    ]
    # Older artifacts record the command line too, which may name folders of the machine that fitted
    # them; the other fields say the same about the fit.
    training = {name: value for name, value in entry.manifest.training.items() if name != "command"}
    body = {**_describe(entry, context), "training": training, "history": history}
    return JSONResponse(body)


@router.get(
    "/{reference}/artifact",
    summary="Download an artifact",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def download(reference: str, context: Context) -> Response:
    """Send the artifact's bytes, as they were uploaded."""
    with _name_errors():
        entry = context.registry.resolve(reference)
    return await open_download(context.registry, context.disk, entry)


@router.delete("/{name}", summary="Delete a name", dependencies=[Depends(require_admin)])
async def delete(name: str, context: Context) -> Response:
    """Delete a name. Running requests keep the artifacts that they pinned."""
    if name.startswith(DIGEST_PREFIX):
        raise invalid("Only a name can be deleted, not a digest.", "name", "invalid_name")
    with _name_errors():
        digest = await context.disk.call(context.registry.delete, name)
    return JSONResponse({"name": name, "digest": digest, "deleted": True})


def _read(
    staged: StagedUpload, context: ServerContext
) -> tuple[Artifact, tuple[str, ...], str | None]:
    """Check an upload by itself and against the model.

    Returns:
        The artifact, warnings, and why it cannot be served (None if it can).
    """
    model = context.engine.model
    limits = ArtifactLimits(max_bytes=context.settings.max_artifact_bytes)
    try:
        artifact = read_artifact(staged.path, limits)
        shapes = shapes_of(artifact.parameters)
        warnings = check_shapes(artifact.manifest, shapes, model)
        return artifact, warnings, unservable_reason(shapes, model)
    except UnreadableArtifactError as error:
        raise unreadable_upload() from error
    except ArtifactError as error:
        raise invalid(str(error), "file", "invalid_artifact") from error
    except IncompatibleArtifactError as error:
        raise invalid(str(error), "file", "incompatible_artifact") from error


@contextmanager
def _name_errors() -> Iterator[None]:
    """Turn errors about the request's name into answers that name the field."""
    try:
        yield
    except InvalidNameError as error:
        raise invalid(str(error), "name", "invalid_name") from None
    except UnknownInterventionError as error:
        raise from_registry(error, "name") from None


def _describe(entry: Entry, context: ServerContext) -> Json:
    warnings, reason = context.steering.servable(entry)
    return _summary(entry, warnings, reason)


def _summary(entry: Entry, warnings: tuple[str, ...], reason: str | None) -> Json:
    manifest = entry.manifest.model_dump(mode="json")
    return {
        "object": "intervention",
        "name": entry.name,
        "digest": entry.digest,
        "size": entry.size,
        "created": entry.created.isoformat(),
        "servable": reason is None,
        "reason": reason,
        "warnings": list(warnings),
        **{field: manifest[field] for field in SHOWN},
    }
