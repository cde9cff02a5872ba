"""Sends a stored artifact, piece by piece."""

from typing import BinaryIO, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from interventions.catalogue import DIGEST_PREFIX, Entry
from interventions.errors import DamagedInterventionError, disk_errors
from interventions.registry import Registry
from server.api.disk import RegistryDisk

_PIECE: Final = 1 << 18  # bytes


async def open_download(registry: Registry, disk: RegistryDisk, entry: Entry) -> "ArtifactDownload":
    """Pin an artifact and open its file; the response unpins and closes them.

    Raises:
        UnknownInterventionError: the artifact has just been deleted, or its file cannot be opened.
        RegistryUnreadableError: the registry's folder cannot be read now.
    """
    registry.pin(entry.digest)  # a deletion must not take the file away while it is sent
    try:
        file = await disk.call(_open, registry, entry)
    except BaseException:
        registry.unpin(entry.digest)
        raise
    return ArtifactDownload(registry, disk, entry, file)


class ArtifactDownload(Response):
    """Sends an artifact's bytes; the artifact is pinned until all are sent or the client leaves."""

    def __init__(
        self, registry: Registry, disk: RegistryDisk, entry: Entry, file: BinaryIO
    ) -> None:
        stem = entry.name.removeprefix(DIGEST_PREFIX)
        super().__init__(
            media_type="application/octet-stream",
            headers={
                "Accept-Ranges": "none",
                "Content-Disposition": f'attachment; filename="{stem}.safetensors"',
                "Content-Length": str(entry.size),
                "ETag": f'"{entry.digest}"',
            },
        )
        self._registry = registry
        self._disk = disk
        self._digest = entry.digest
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the bytes; a client that gets too few of them notices by the Content-Length."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            while piece := await self._disk.call(_read, self._file):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._registry.unpin(self._digest)
            await self._disk.end(self._file.close)


def _open(registry: Registry, entry: Entry) -> BinaryIO:
    try:
        return registry.path(entry.digest).open("rb")
    except OSError as error:
        registry.check_readable()
        raise DamagedInterventionError(entry.name, str(error)) from error


def _read(file: BinaryIO) -> bytes:
    with disk_errors():
        return file.read(_PIECE)
