"""Resolves every request's steering in this one place, so that no request avoids the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from interventions.catalogue import Entry
from interventions.compatibility import (
    IncompatibleArtifactError,
    check_shapes,
    unservable_reason,
)
from interventions.errors import UnknownInterventionError
from interventions.model import ModelDescription
from interventions.registry import Registry
from interventions.request_settings import Caps, InvalidSettingError, resolve_settings
from server.api.applied_steering import AppliedSteering, Resolved, Source, message_for_client
from server.api.default_steering import DefaultArtifacts, default_unavailable
from server.api.errors import ApiError, from_registry, invalid
from server.config import SteeringPolicy
from server.engine.base import Engine
from server.engine.errors import EngineError
from server.engine.request import Edit, Request, SamplingSettings

MAX_STACK: Final = 4


@dataclass(frozen=True, slots=True)
class RequestedIntervention:
    """An intervention as a request or the operator names it, and where for error messages."""

    reference: str
    settings: Mapping[str, object]
    param: str
    reference_param: str


class SteeringResolver:
    """Resolves every request's steering under the server's default and policy."""

    def __init__(
        self,
        registry: Registry,
        model: ModelDescription,
        default: object,
        policy: SteeringPolicy,
        caps: Caps,
    ) -> None:
        """Resolve the default steering once; it stays the same if its names change their targets.

        Raises:
            ApiError: the default is not a `steering` value, cannot be applied, or does nothing
                although the policy wants every request steered.
        """
        self._registry = registry
        self._model = model
        self.policy: Final = policy
        self._caps = caps
        requested = _parse_steering(default, "default_steering")
        try:
            self._default = self._resolve(requested)
        except ApiError as error:
            raise default_unavailable(error.message) from error
        if policy != "optional" and self._default and _does_nothing(self._default):
            raise default_unavailable(
                f"its settings do nothing, and the policy `{policy}` wants every request steered."
            )
        given = zip(requested, self._default, strict=True)
        self.default_artifacts = DefaultArtifacts(
            registry, {item.reference: resolved.entry for item, resolved in given}
        )
        problem = self.default_artifacts.problem()
        if problem is not None:
            raise default_unavailable(problem)

    def apply(self, suffix: str | None, value: object, *, given: bool) -> AppliedSteering:
        """Resolve the steering of a request, and pin its artifacts.

        Args:
            suffix: the intervention that the request's model names after a `+`.
            value: the request's field `steering`.
            given: whether the request has that field; null is a value too.

        Raises:
            ApiError: the steering cannot be applied, or the policy does not allow it.
        """
        source: Source = "request" if given else "model" if suffix is not None else "default"
        if given and suffix is not None:
            raise invalid(
                "The model's name and the field 'steering' both choose interventions: "
                "give one of them.",
                "steering",
            )
        if source == "default":
            resolved = self._default
        else:
            requested = (
                _parse_steering(value)
                if suffix is None
                else (RequestedIntervention(suffix, {}, "model", "model"),)
            )
            resolved = self._resolve_choice(requested)
        self._check_required(resolved)
        steering = AppliedSteering(resolved, source, self._registry)
        try:
            steering.pin()
        except UnknownInterventionError as error:
            raise from_registry(error, "steering.intervention") from None
        return steering

    @property
    def default_echo(self) -> list[JsonValue]:
        """The default steering, as answers report it; empty without one."""
        return AppliedSteering(self._default, "default", self._registry).echo

    async def try_default(self, engine: Engine) -> None:
        """Have the engine generate one token with the default steering.

        Raises:
            ApiError: the engine cannot, so that every request with the default would fail.
        """
        edits = tuple(item.edit for item in self._default)
        if not edits:
            return
        sampling = SamplingSettings(max_tokens=1, temperature=0.0, ignore_eos=True)
        try:
            [generation] = await engine.submit([Request("default", (0,), sampling, edits)])
            async for _ in generation:
                pass
        except (EngineError, UnknownInterventionError) as error:
            raise default_unavailable(message_for_client(error)) from error

    def servable(self, entry: Entry) -> tuple[tuple[str, ...], str | None]:
        """Return an entry's warnings, and why it cannot be served (None if it can)."""
        try:
            shapes = self._registry.shapes(entry.digest)
            warnings = check_shapes(entry.manifest, shapes, self._model)
            return warnings, unservable_reason(shapes, self._model)
        except (IncompatibleArtifactError, UnknownInterventionError) as error:
            return (), str(error)

    def _resolve_choice(self, requested: Sequence[RequestedIntervention]) -> tuple[Resolved, ...]:
        """Resolve a request's own choice; a locked policy allows only that of the default."""
        if self.policy != "locked":
            return self._resolve(requested)
        try:
            resolved = self._resolve(requested)
        except ApiError as error:
            raise _locked() from error
        if [item.edit for item in resolved] != [item.edit for item in self._default]:
            raise _locked()
        return resolved

    def _check_required(self, resolved: Sequence[Resolved]) -> None:
        if self.policy == "optional":
            return
        if not resolved:
            message = "This server requires steering: name an intervention in the field 'steering'."
            raise invalid(message, "steering", "steering_required")
        if self.policy == "required" and _does_nothing(resolved):
            message = "This server requires steering, and these settings do nothing."
            raise invalid(message, "steering", "steering_required")

    def _resolve(self, requested: Sequence[RequestedIntervention]) -> tuple[Resolved, ...]:
        return tuple(self._resolve_one(item) for item in requested)

    def _resolve_one(self, requested: RequestedIntervention) -> Resolved:
        try:
            entry = self._registry.resolve(requested.reference)
            settings = resolve_settings(entry.manifest, requested.settings, self._caps)
        except UnknownInterventionError as error:
            raise from_registry(error, requested.reference_param) from None
        except InvalidSettingError as error:
            param = f"{requested.param}.{error.field[:100]}"
            raise invalid(str(error), param, "invalid_setting") from None
        _, reason = self.servable(entry)
        if reason is not None:
            raise invalid(
                f"The intervention '{entry.name}' cannot be served. {reason}",
                requested.reference_param,
                "intervention_not_servable",
            )
        return Resolved(entry, Edit(entry.digest, settings))


def _parse_steering(value: object, param: str = "steering") -> tuple[RequestedIntervention, ...]:
    """Return the interventions that a `steering` value names, in order; none for null.

    Raises:
        ApiError: it is not null, an object with an `intervention`, or a list of at most 4 such.
    """
    if value is None:
        return ()
    if isinstance(value, dict):
        return (_parse_one(value, param),)
    if not isinstance(value, list):
        raise invalid(
            f"'{param}' must be an object, a list of objects, or null.", param, "invalid_type"
        )
    if len(value) > MAX_STACK:
        raise invalid(
            f"'{param}' lists {len(value)} interventions; at most {MAX_STACK} can be stacked.",
            param,
            "too_many_interventions",
        )
    return tuple(_parse_one(item, f"{param}[{place}]") for place, item in enumerate(value))


def _parse_one(value: object, param: str) -> RequestedIntervention:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    reference_param = f"{param}.intervention"
    if "intervention" not in value:
        message = f"'{param}' lacks 'intervention', the name of what to steer by."
        raise invalid(message, reference_param, "missing_required_parameter")
    reference = value["intervention"]
    if not isinstance(reference, str):
        message = f"'{reference_param}' must be a string: a name or sha256:<digest>."
        raise invalid(message, reference_param, "invalid_type")
    settings = {key: item for key, item in value.items() if key != "intervention"}
    return RequestedIntervention(reference, settings, param, reference_param)


def _does_nothing(resolved: Sequence[Resolved]) -> bool:
    return all(item.edit.settings.does_nothing for item in resolved)


def _locked() -> ApiError:
    return ApiError(
        403,
        "This server's steering is locked: a request can neither change nor drop it.",
        param="steering",
        code="steering_locked",
    )
