"""The API's own documentation: the schema at /openapi.json, and a page that shows it at /docs.

The page's files come from a Python package; a browser loads nothing from the internet.
"""

from collections.abc import Sequence
from copy import deepcopy
from importlib.resources import files
from typing import Final, TypeAlias

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel, JsonValue
from starlette.responses import JSONResponse, Response

from server.api.auth import require_api_key
from server.api.context import AnyTimeContext
from server.api.errors import ApiError

Json: TypeAlias = dict[str, JsonValue]

_ASSETS: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_REFERENCE: Final = "#/components/schemas/{model}"
_STEERING: Final[Sequence[tuple[str, JsonValue]]] = (
    ("steered", {"intervention": "detox-lineas", "strength": 0.8}),
    (
        "steered by a stack",
        [{"intervention": "detox-lineas"}, {"intervention": "detox-argre", "iterations": 5}],
    ),
    ("not steered, whatever the default", None),
)
_COMPARED: Final[Json] = {"steering": {"intervention": "detox-argre"}, "compare": True}
# Paths that begin so ask for a key if one is set.
_KEYED: Final = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info", "/metrics")

router = APIRouter(include_in_schema=False)


class ErrorBody(BaseModel):
    """An error: a sentence for people, and the field and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


def json_body(model: type[BaseModel], example: Json) -> dict[str, Json]:
    """Return the `openapi_extra` of a route that parses its body itself and may stream.

    Args:
        example: a body that works on the embedded model.
    """
    schema = model.model_json_schema(ref_template=_REFERENCE)
    for field in schema["properties"].values():
        if field.get("default") == []:  # means "not given", and may contradict the field's schema
            del field["default"]
    examples: Json = {"plain": {"value": example}}
    if "steering" in model.model_fields:
        for name, steering in _STEERING:
            examples[name] = {"value": {**example, "steering": steering}}
        examples["compared"] = {"value": {**example, **_COMPARED}}
    body: Json = {"schema": schema, "examples": examples}
    stream: Json = {"schema": {"type": "string", "description": "With `stream`: events."}}
    return {
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": {"content": {"text/event-stream": stream}}},
    }


def upload_body() -> dict[str, Json]:
    """Return the `openapi_extra` of a route that takes a form with an artifact and its name."""
    properties: Json = {
        "file": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "The artifact, a .safetensors file.",
        },
        "name": {"type": "string", "description": "Its name, if not the one in its manifest."},
    }
    schema: Json = {"type": "object", "properties": properties, "required": ["file"]}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


async def _refuse_with_key(context: AnyTimeContext) -> None:
    """Raise a 404 for the page if an API key is set, because browsers would send no key."""
    if context.settings.api_key is not None:
        raise ApiError(
            404,
            "This page is off where the server has an API key, which a browser would not send. "
            "The schema is at /openapi.json, for requests with the key.",
            code="documentation_off",
        )


@router.get("/openapi.json", dependencies=[Depends(require_api_key)])
async def show_schema(request: Request) -> Response:
    """Show the schema of the whole API, in OpenAPI's format."""
    app = request.app
    assert isinstance(app, FastAPI)
    if app.openapi_schema is None:
        app.openapi_schema = _schema(app)
    return JSONResponse(app.openapi_schema)


@router.get("/docs", dependencies=[Depends(_refuse_with_key)])
async def show_page() -> Response:
    """Show the schema in a browser."""
    return get_swagger_ui_html(
        # These addresses are relative to the page, because a proxy may put a path before them.
        openapi_url="openapi.json",
        title="steerserve",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # by default it asks a server of swagger.io
    )


@router.get("/docs/{asset}", dependencies=[Depends(_refuse_with_key)])
async def show_asset(asset: str) -> Response:
    """Send one of the page's files."""
    if asset not in _ASSETS:
        raise ApiError(404, f"The documentation page has no file '{asset[:100]}'.")
    path = files("fastapi_offline") / "static" / asset
    content = await to_thread.run_sync(path.read_bytes)
    headers = {"Cache-Control": "max-age=3600"}
    return Response(content, media_type=_ASSETS[asset], headers=headers)


def _schema(app: FastAPI) -> dict[str, object]:
    """Build the schema from the routes, and move the bodies' definitions to its components."""
    schema = deepcopy(app.openapi())  # it shares parts with the routes
    # Relative to the schema's own address, because a proxy may put a path before it.
    schema["servers"] = [{"url": "."}]
    components = schema["components"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    error = {"$ref": _REFERENCE.format(model=ErrorEnvelope.__name__)}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if path.startswith(_KEYED):
                operation["security"] = [{}, {"key": []}]
            # FastAPI gives errors the media type of the route's other answers.
            operation["responses"]["default"]["content"] = {"application/json": {"schema": error}}
            content = operation.get("requestBody", {}).get("content", {})
            for media_type in content.values():
                components["schemas"].update(media_type["schema"].pop("$defs", {}))
    return schema
