"""`/v1/steering` tells what steering a request may choose, and what it gets if it chooses none."""

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api.context import Context
from server.api.steering_resolver import MAX_STACK

router = APIRouter(prefix="/steering")


@router.get("", summary="Show the steering policy")
async def show_policy(context: Context) -> Response:
    """Show the policy, the default steering with all its settings, and what answers can have.

    `comparison` says whether a request may have the base model's answer, `toxicity` whether
    answers can have scores.
    """
    steering = context.steering
    return JSONResponse(
        {
            "object": "steering",
            "policy": steering.policy,
            "default": steering.default_echo,
            "max_interventions": MAX_STACK,
            "comparison": steering.policy == "optional",
            "toxicity": context.scoring is not None,
        }
    )
