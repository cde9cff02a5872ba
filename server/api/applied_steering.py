"""The resolved steering of one request: what is applied, reported, pinned and released."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from pydantic import JsonValue

from interventions.catalogue import DIGEST_PREFIX, Entry
from interventions.errors import UnknownInterventionError
from interventions.registry import Registry
from server.api.default_steering import default_unavailable
from server.api.errors import from_registry
from server.engine.base import Edit, EngineError, UnservableInterventionError
from server.metrics import NONE, OTHER, SEPARATOR
from server.records import InterventionRecord

Source: TypeAlias = Literal["request", "model", "default"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """One intervention of a request: its registry entry, and its edit with all settings."""

    entry: Entry
    edit: Edit


@dataclass(slots=True)
class AppliedSteering:
    """The steering of one request. It holds pins in the registry from `pin` to `release`."""

    edits: tuple[Edit, ...]
    echo: tuple[JsonValue, ...]  # the answer's field `steering`
    kind: str | None  # for the metrics; None if nothing is edited
    labels: tuple[str, ...]  # for the metrics, one for each effective edit
    interventions: tuple[InterventionRecord, ...]  # for the log
    source: Source
    _registry: Registry
    _pinned: list[str] = field(default_factory=list)

    def pin(self) -> None:
        """Pin the artifacts, so that their bytes stay even if their names are deleted.

        Raises:
            UnknownInterventionError: an artifact has just been deleted; nothing stays pinned.
        """
        try:
            for edit in self.edits:
                self._registry.pin(edit.digest)
                self._pinned.append(edit.digest)
        except UnknownInterventionError:
            self.release()
            raise

    @contextmanager
    def default_failures_as_503(self) -> Iterator[None]:
        """Turn a failure in the block to load or apply the default steering into a 503.

        The request did not choose the default steering, so it is not at fault.
        """
        try:
            yield
        except (UnknownInterventionError, UnservableInterventionError) as error:
            if self.source != "default" or not self.edits:
                raise
            raise default_unavailable(message_for_client(error)) from error

    @property
    def label(self) -> str:
        """The labels of all effective edits, joined to one label of the metrics."""
        return SEPARATOR.join(self.labels) or NONE

    def release(self) -> None:
        """Undo the pins. May be called again."""
        while self._pinned:
            self._registry.unpin(self._pinned.pop())


def build_applied_steering(
    resolved: Sequence[Resolved], source: Source, registry: Registry
) -> AppliedSteering:
    """Build a request's steering from its resolved interventions, without pinning them."""
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
        source=source,
        _registry=registry,
    )


def message_for_client(error: EngineError | UnknownInterventionError) -> str:
    """Return the error as a sentence for the client; a damaged artifact's path is only logged."""
    return (
        from_registry(error).message if isinstance(error, UnknownInterventionError) else str(error)
    )


def _label(entry: Entry) -> str:
    # Labels are registry names, so a digest that no name points to must not become one. The names
    # NONE and OTHER have meanings of their own among the labels.
    nameless = entry.name.startswith(DIGEST_PREFIX) or entry.name in (NONE, OTHER)
    return OTHER if nameless else entry.name
