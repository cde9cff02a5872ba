"""From what a request says of steering to what is applied: one place, so that none slips by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from pydantic import JsonValue

from interventions.compatibility import IncompatibleArtifactError, check_shapes
from interventions.model import ModelDescription
from interventions.registry import (
    DIGEST_PREFIX,
    Entry,
    Registry,
    UnknownInterventionError,
)
from interventions.settings import Caps, InvalidSettingError, resolve_settings
from server.api.errors import ApiError, from_registry, invalid
from server.api.wanted import Wanted, parse_steering
from server.config import SteeringPolicy
from server.engine.base import Edit
from server.metrics import NONE, OTHER, SEPARATOR
from server.records import InterventionRecord

Source: TypeAlias = Literal["request", "model", "default"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """One intervention of a request: what is stored, and the settings in full."""

    entry: Entry
    edit: Edit


@dataclass(slots=True)
class AppliedSteering:
    """What a request is steered by. Holds pins in the registry until `release`."""

    edits: tuple[Edit, ...]
    echo: tuple[JsonValue, ...]  # for the client
    kind: str | None  # for the metrics; None where nothing is edited
    labels: tuple[str, ...]  # for the metrics, of each effective edit
    interventions: tuple[InterventionRecord, ...]  # for the log
    _registry: Registry
    _pinned: list[str] = field(default_factory=list)

    def pin(self) -> None:
        """Keep the artifacts' bytes, whatever is deleted meanwhile.

        Raises:
            UnknownInterventionError: one has just been deleted; nothing stays pinned.
        """
        try:
            for edit in self.edits:
                self._registry.pin(edit.digest)
                self._pinned.append(edit.digest)
        except UnknownInterventionError:
            self.release()
            raise

    @property
    def label(self) -> str:
        """All effective edits, for the metrics."""
        return SEPARATOR.join(self.labels) or NONE

    def release(self) -> None:
        """Undo the pins. May be called again."""
        while self._pinned:
            self._registry.unpin(self._pinned.pop())


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
        """Raises ApiError if the default is not a `steering` value."""
        self._registry = registry
        self._model = model
        self._default = parse_steering(default, "default_steering")
        self._policy = policy
        self._caps = caps

    def apply(self, suffix: str | None, value: object, *, given: bool) -> AppliedSteering:
        """What to apply to a request, its artifacts pinned.

        Args:
            suffix: the intervention that the request's model named after a `+`.
            value: the request's `steering`.
            given: whether it has one; null is one.

        Raises:
            ApiError: it cannot be applied, or the policy does not allow it.
        """
        source: Source = "request" if given else "model" if suffix is not None else "default"
        if given and suffix is not None:
            raise invalid(
                "The model's name and the field 'steering' both choose interventions: "
                "give one of them.",
                "steering",
            )
        if source == "default":
            resolved = self.default()
        else:
            wanted = (
                parse_steering(value) if suffix is None else (Wanted(suffix, {}, "model", "model"),)
            )
            resolved = self._chosen(wanted)
        self._check_required(resolved)
        steering = self._applied(resolved, source)
        try:
            steering.pin()
        except UnknownInterventionError as error:
            raise from_registry(error, "steering.intervention") from None
        return steering

    @property
    def default_references(self) -> frozenset[str]:
        """The names and digests that the server's default steering needs."""
        return frozenset(wanted.reference for wanted in self._default)

    def default(self) -> tuple[Resolved, ...]:
        """The server's default steering, as the registry is now.

        Raises:
            ApiError: a 503. The request is not at fault, and is not served without.
        """
        try:
            return self._resolve(self._default)
        except ApiError as error:
            raise ApiError(
                503,
                f"The server's default steering cannot be applied: {error.message}",
                code="default_steering_unavailable",
            ) from error

    def servable(self, entry: Entry) -> tuple[tuple[str, ...], str | None]:
        """Warnings for an entry, and the reason why the model cannot take it (None if it can)."""
        try:
            shapes = self._registry.shapes(entry.digest)
            return check_shapes(entry.manifest, shapes, self._model), None
        except (IncompatibleArtifactError, UnknownInterventionError) as error:
            return (), str(error)

    def _chosen(self, wanted: Sequence[Wanted]) -> tuple[Resolved, ...]:
        """What the request itself chose, where the policy lets it choose."""
        if self._policy != "locked":
            return self._resolve(wanted)
        default = self.default()
        try:
            resolved = self._resolve(wanted)
        except ApiError as error:
            raise _locked() from error
        if [item.edit for item in resolved] != [item.edit for item in default]:
            raise _locked()
        return resolved

    def _check_required(self, resolved: Sequence[Resolved]) -> None:
        if self._policy == "optional":
            return
        if not resolved:
            raise invalid(
                "This server requires steering: name an intervention in the field 'steering'.",
                "steering",
                "steering_required",
            )
        if self._policy == "required" and all(item.edit.settings.does_nothing for item in resolved):
            raise invalid(
                "This server requires steering, and these settings do nothing.",
                "steering",
                "steering_required",
            )

    def _resolve(self, wanted: Sequence[Wanted]) -> tuple[Resolved, ...]:
        return tuple(self._resolve_one(item) for item in wanted)

    def _resolve_one(self, wanted: Wanted) -> Resolved:
        try:
            entry = self._registry.resolve(wanted.reference)
            settings = resolve_settings(entry.manifest, wanted.settings, self._caps)
        except UnknownInterventionError as error:
            raise from_registry(error, wanted.reference_param) from None
        except InvalidSettingError as error:
            param = f"{wanted.param}.{error.field[:100]}"
            raise invalid(error.message, param, "invalid_setting") from None
        _, reason = self.servable(entry)
        if reason is not None:
            raise invalid(
                f"The loaded model cannot take the intervention '{entry.name}'. {reason}",
                wanted.reference_param,
                "intervention_not_servable",
            )
        return Resolved(entry, Edit(entry.digest, settings))

    def _applied(self, resolved: Sequence[Resolved], source: Source) -> AppliedSteering:
        effective = [item.entry for item in resolved if not item.edit.settings.does_nothing]
        kinds = sorted({entry.manifest.kind for entry in effective})
        return AppliedSteering(
            edits=tuple(item.edit for item in resolved),
            echo=tuple(
                {
                    "intervention": item.entry.name,
                    "digest": item.entry.digest,
                    "kind": item.entry.manifest.kind,
                    "settings": asdict(item.edit.settings),
                    "source": source,
                }
                for item in resolved
            ),
            kind=SEPARATOR.join(kinds) or None,
            labels=tuple(map(_label, effective)),
            interventions=tuple(
                InterventionRecord(item.entry.name, item.entry.digest, item.entry.manifest.kind)
                for item in resolved
            ),
            _registry=self._registry,
        )


def _label(entry: Entry) -> str:
    # A digest that no name points to any more is no name: it must not become a label. And two
    # names mean something else there.
    nameless = entry.name.startswith(DIGEST_PREFIX) or entry.name in (NONE, OTHER)
    return OTHER if nameless else entry.name


def _locked() -> ApiError:
    return ApiError(
        403,
        "This server's steering is locked: a request can neither change nor drop it.",
        param="steering",
        code="steering_locked",
    )
