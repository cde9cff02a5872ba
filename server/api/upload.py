"""Reads an uploaded artifact from its multipart form, chunk by chunk, to its staged file."""

from collections.abc import Awaitable, Callable
from typing import Final

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from interventions.header import ArtifactError
from server.api.errors import ApiError, invalid, too_large

FILE: Final = "file"
NAME: Final = "name"
MAX_NAME_BYTES: Final = 1000  # above any valid name; the registry checks the exact length
MAX_HEADER_BYTES: Final = 8 * 1024  # of all headers of one part


class UploadForm:
    """Parses the form as its bytes come."""

    def __init__(self, boundary: bytes) -> None:
        """Set up the parser; raises FormParserError if the boundary is not valid."""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )
        self._header_name = b""
        self._header_value = b""
        self._header_bytes = 0  # of the current part
        self._disposition = b""
        self._field = ""
        self._seen: set[str] = set()
        self._name = bytearray()
        self._file: list[bytes] = []
        self._complete = False

    def feed(self, data: bytes) -> bytes:
        """Parse the next bytes of the body; return those of them that belong to the file.

        Raises:
            ApiError, FormParserError: the body is not a valid form with the right fields.
        """
        self._file.clear()
        self._parser.write(data)
        return b"".join(self._file)

    def finish(self) -> str | None:
        """Return the field `name`, None if there is none, after the whole body was fed.

        Raises:
            ApiError: the form is incomplete, has no file, or has a name that is not UTF-8.
        """
        if not self._complete:
            raise invalid("The form ends before its last boundary.", FILE, "invalid_form")
        if FILE not in self._seen:
            raise invalid("The form lacks the field 'file'.", FILE, "missing_required_parameter")
        if NAME not in self._seen:
            return None
        try:
            return self._name.decode()
        except UnicodeDecodeError:
            raise invalid("The field 'name' is not UTF-8.", NAME, "invalid_name") from None

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._header_bytes = 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            message = f"The headers of a part of the form exceed {MAX_HEADER_BYTES} bytes."
            raise invalid(message, None, "invalid_form")

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("latin-1")
        if field not in (FILE, NAME):
            message = f"The form's fields are 'file' and 'name'; it has '{field[:100]}'."
            raise invalid(message, field[:100] or None, "unknown_parameter")
        if field in self._seen:
            raise invalid(f"The form has the field '{field}' twice.", field, "invalid_form")
        self._seen.add(field)
        self._field = field

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == FILE:
            self._file.append(data[start:end])
            return
        self._name += data[start:end]
        if len(self._name) > MAX_NAME_BYTES:
            raise invalid("The field 'name' is too long.", NAME, "invalid_name")

    def _on_end(self) -> None:
        self._complete = True


async def receive_upload(
    request: Request, write: Callable[[bytes], Awaitable[None]], max_bytes: int
) -> str | None:
    """Pass the form's file to `write` as it comes; return the form's `name`, None if it has none.

    Raises:
        ApiError: the body is not a form (400, 415), or the file is too large (413).
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(
            415,
            "Upload the artifact as multipart/form-data with the fields 'file' and, if it shall "
            "have another name than its own, 'name'.",
            code="unsupported_media_type",
        )
    try:
        form = UploadForm(options[b"boundary"])
        size = 0
        async for chunk in request.stream():
            # In a thread, because a form of many small pieces takes the parser long.
            data = await to_thread.run_sync(form.feed, chunk) if chunk else b""
            size += len(data)
            if size > max_bytes:
                raise too_large("artifact", max_bytes, FILE)
            if data:
                await write(data)
    except FormParserError:
        raise invalid("The body is not a valid multipart form.", None, "invalid_form") from None
    except ArtifactError as error:
        raise ApiError(413, str(error), param=FILE, code="request_too_large") from None
    return form.finish()
