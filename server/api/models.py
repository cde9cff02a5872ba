"""`/v1/models` lists the served names, alone and with each intervention that the model can take."""

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter
from pydantic import JsonValue
from starlette.responses import JSONResponse, Response

from server.api.context import Context, ServerContext
from server.api.errors import ApiError

SEPARATOR: Final = "+"  # between a served name and an intervention's name

router = APIRouter(prefix="/models")


@router.get("", summary="List the models")
async def list_models(context: Context) -> Response:
    """List the served names first, then `<served name>+<intervention>`."""
    return JSONResponse({"object": "list", "data": list(_models(context).values())})


@router.get("/{model_id:path}", summary="Show a model")
async def show_model(model_id: str, context: Context) -> Response:
    """Show one model of the list."""
    model = _models(context).get(model_id)
    if model is None:
        raise _model_not_found(model_id, context.settings.served_names)
    return JSONResponse(model)


def _models(context: ServerContext) -> dict[str, JsonValue]:
    names = context.settings.served_names
    models = {name: _model(name, None, context.started, context) for name in names}
    for entry in context.registry.entries():
        _, reason = context.steering.servable(entry)
        if reason is None:
            created = int(entry.created.timestamp())
            for name in names:
                steered = f"{name}{SEPARATOR}{entry.name}"
                models[steered] = _model(steered, name, created, context)
    return models


def _model(name: str, parent: str | None, created: int, context: ServerContext) -> JsonValue:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "steerserve",
        "root": context.engine.model.id,
        "parent": parent,
        "max_model_len": context.engine.max_model_len,
    }


def split_model(model: str, served: Sequence[str]) -> tuple[str, str | None]:
    """Split a model id into the served name and the intervention's name; 404 if it is unknown."""
    name, separator, intervention = model.partition(SEPARATOR)
    if name not in served or (separator and not intervention):
        raise _model_not_found(model, served)
    return name, intervention if separator else None


def _model_not_found(model: str, served: Sequence[str]) -> ApiError:
    return ApiError(
        404,
        f"The model '{model[:200]}' does not exist; this server has {', '.join(served)}.",
        param="model",
        code="model_not_found",
    )
