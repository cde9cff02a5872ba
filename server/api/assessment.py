"""Assesses finished completions: their toxicity, and how they compare with the base model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from server.api.applied_steering import AppliedSteering
from server.api.comparison import mean_log_ratio
from server.api.context import ServerContext
from server.api.errors import RETRY_SECONDS, ApiError, invalid
from server.api.fields import GenerationFields
from server.api.frames import Choice, Frame
from server.api.generations import GenerationGroup
from server.api.progress import Progress
from server.metrics import Arm
from server.toxicity.queue import ScoringQueue
from server.toxicity.scorer import ScoringError


@dataclass(frozen=True, slots=True)
class Assessment:
    """Assesses the completions of one request."""

    _context: ServerContext
    _params: GenerationFields
    _steering: AppliedSteering

    async def conclude(
        self, group: GenerationGroup, base_choices: Sequence[Choice], frame: Frame
    ) -> Mapping[str, JsonValue]:
        """Return the answer's further fields: `toxicity` and `comparison`, if asked for.

        Completions whose score was not asked for are scored in the background.

        Raises:
            ApiError: `toxicity` was asked for and no score can be had. (A comparison alone gets
                null scores then.)
        """
        params, scoring = self._params, self._context.scoring
        # With `max_tokens` 0 a prompt is only read, and nothing is completed.
        completed = [progress for progress in group.served if progress.tokens]
        if self._steering.labels and not params.compare and not self._context.lifecycle.stopping:
            for progress in completed:
                self._context.baselines.offer(progress.request, self._steering.label)
        fields: dict[str, JsonValue] = {}
        if scoring is not None and (params.toxicity or params.compare):
            fields["toxicity"] = await self._score(scoring, group.served, "served")
        elif scoring is not None:
            for progress in completed:
                scoring.offer(progress.text, self._steering.label, "served")
        if params.compare:
            fields["comparison"] = await self._compare(group, base_choices, frame)
        return fields

    async def _compare(
        self, group: GenerationGroup, base_choices: Sequence[Choice], frame: Frame
    ) -> dict[str, JsonValue]:
        scoring = self._context.scoring
        fields: dict[str, JsonValue] = {
            "choices": [choice.body() for choice in base_choices],
            "usage": frame.usage(group.compared_usage),
            "mean_log_ratio": [mean_log_ratio(progress) for progress in group.served],
        }
        if scoring is not None:
            fields["toxicity"] = await self._score(scoring, group.compared, "baseline")
        return fields

    async def _score(
        self, scoring: ScoringQueue, completions: Sequence[Progress], arm: Arm
    ) -> list[JsonValue]:
        """Return each completion's toxicity score, null for a completion without tokens."""
        texts = [progress.text for progress in completions if progress.tokens]
        try:
            scores = iter(await scoring.score(texts, self._steering.label, arm))
        except ScoringError as error:
            if not self._params.toxicity:
                return [None] * len(completions)
            # The reason is for the operator, and in the log.
            raise ApiError(
                503,
                "The toxicity of the answer cannot be told now; try again later.",
                param="toxicity",
                code="toxicity_unavailable",
                headers={"Retry-After": RETRY_SECONDS},
            ) from error
        return [next(scores) if progress.tokens else None for progress in completions]


def check_assessment_available(params: GenerationFields, context: ServerContext) -> None:
    """Raise an ApiError if this server cannot give the score or comparison that is asked for."""
    if params.toxicity and context.scoring is None:
        raise invalid(
            "This server scores no toxicity: it was started with --toxicity-scorer none.",
            "toxicity",
            "unsupported_parameter",
        )
    if params.compare and context.settings.steering_policy != "optional":
        # A comparison contains the unsteered answer.
        raise ApiError(
            403,
            "This server's steering policy gives nobody the base model's answer.",
            param="compare",
            code="comparison_not_allowed",
        )


def check_comparison_steered(params: GenerationFields, steering: AppliedSteering) -> None:
    """Raise an ApiError if a comparison is asked for, and nothing steers the request."""
    if params.compare and not steering.edits:
        raise invalid(
            "'compare' sets the base model's answer beside the steered one, and nothing steers "
            "this request.",
            "compare",
            "invalid_value",
        )
