"""Who may do what: the API key for `/v1`, the admin key to change the registry."""

import secrets
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import SecretStr

from server.api.context import Context
from server.api.errors import ApiError

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


async def require_api_key(request: Request, context: Context) -> None:
    """Refuse a request without the API key, where one is set. The admin key does as well.

    Raises:
        ApiError: 401.
    """
    settings = context.settings
    if settings.api_key is None:
        return
    presented = _presented_key(request)
    # Both are compared, whatever the first says.
    if not (_equal(presented, settings.api_key) | _equal(presented, settings.admin_key)):
        raise _unauthorized(presented)


async def require_admin(request: Request, context: Context) -> None:
    """Refuse a change of the registry by anybody but its admin.

    Without an admin key, whoever reaches a server that is bound to loopback is its admin, except a
    web page that the user's browser shows: any page may post a form to 127.0.0.1.

    Raises:
        ApiError: 401 or 403.
    """
    settings = context.settings
    if settings.admin_key is not None:
        presented = _presented_key(request)
        if _equal(presented, settings.admin_key):
            return
        if _equal(presented, settings.api_key):
            raise _forbidden("Uploading and deleting need the admin key; this is the API key.")
        raise _unauthorized(presented)
    if not settings.binds_loopback:
        raise _forbidden(
            "Uploading and deleting are off: this server is not bound to a loopback address. "
            "Start it with --admin-key to turn them on."
        )
    if not _comes_from_here(request):
        raise _forbidden("Uploading and deleting from another site's page are not allowed.")


def _presented_key(request: Request) -> bytes | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" and key.strip() else None


def _equal(presented: bytes | None, key: SecretStr | None) -> bool:
    if presented is None or key is None:
        return False
    return secrets.compare_digest(presented, key.get_secret_value().encode())


def _comes_from_here(request: Request) -> bool:
    """Whether the request is not a browser's, or is one of a page that this server sent."""
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        parts = urlsplit(origin)
        name = parts.hostname
    except ValueError:
        return False
    # The name too: one that an attacker owns may be made to resolve to 127.0.0.1.
    return name in LOOPBACK_NAMES and parts.netloc == request.headers.get("host")


def _unauthorized(presented: bytes | None) -> ApiError:
    message = (
        "You didn't provide a key: send it as the header Authorization: Bearer <key>."
        if presented is None
        else "Incorrect key provided."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="admin_key_required")
