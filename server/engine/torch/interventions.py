"""The interventions that the engine has loaded: bank, slots and hooks kept in step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeAlias

import torch

from interventions.model import ModelDescription
from server.engine.base import UnservableInterventionError
from server.engine.torch.slots import SlotTable
from steering.affine import AffineParameters
from steering.bank import Bank
from steering.hooks import SteeringHooks
from steering.reward import RewardHead

Parameters: TypeAlias = AffineParameters | RewardHead

_REHEARSAL: Final = ""  # no digest


class LoadedInterventions:
    """Used on the engine thread only.

    `probe` is given the sites that have just been hooked and returns those at which an edit does
    not reach the logits.
    """

    def __init__(
        self,
        capacity: int,
        model: ModelDescription,
        hooks: SteeringHooks,
        device: torch.device,
        probe: Callable[[frozenset[str]], frozenset[str]],
    ) -> None:
        self._model = model
        self.bank = Bank(capacity, device)
        self.slots = SlotTable(capacity)
        self._hooks = hooks
        self._probe = probe
        self._probed_sites: frozenset[str] = frozenset()
        self._dead_sites: frozenset[str] = frozenset()

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those that would have to be installed."""
        return {digest for digest in digests if not self.slots.holds(digest)}

    def pin(self, digest: str) -> int | None:
        """Hold the slot of a loaded intervention; None if it has to be installed first."""
        return self.slots.pin(digest)

    def hold(self, digest: str, parameters: Mapping[str, Parameters]) -> int:
        """Pin an intervention, installing it if it is not loaded; its slot.

        Raises as `install`.
        """
        slot = self.pin(digest)
        return self.install(digest, parameters[digest]) if slot is None else slot

    def unpin(self, digest: str) -> None:
        """Let go of one pin."""
        self.slots.unpin(digest)

    def install(self, digest: str, parameters: Parameters) -> int:
        """Put an intervention into a slot, and pin it.

        Raises:
            BankFullError: every slot is pinned.
            UnservableInterventionError: it does not fit the model, or an edit at one of its sites
                does not reach the logits.
        """
        self._check_fit(parameters)
        if isinstance(parameters, Mapping):
            self._hook(frozenset(parameters))
        slot = self.slots.take(digest)
        try:
            self.bank.put(slot, parameters)
        except BaseException:
            self.slots.drop(digest)
            raise
        return slot

    @contextmanager
    def rehearsed(self, parameters: Parameters) -> Iterator[int]:
        """Within the context, the slot of an intervention that nobody has asked for.

        Its sites stay hooked, tested, and in the bank. Raises as `install`.
        """
        slot = self.install(_REHEARSAL, parameters)
        try:
            yield slot
        finally:
            self.slots.drop(_REHEARSAL)
            self.bank.clear(slot)

    def _check_fit(self, parameters: Parameters) -> None:
        # The registry's artifacts were checked against the model before; nothing else was.
        if isinstance(parameters, Mapping):
            widths = self._model.site_widths
            for site, site_map in parameters.items():
                if site not in widths:
                    raise UnservableInterventionError(f"The model has no site {site!r}.")
                _check_width(site, site_map.weight.numel(), widths[site])
        else:
            _check_width("lm_head", parameters.direction.numel(), self._model.head_width)

    def _hook(self, sites: frozenset[str]) -> None:
        # Probed and not hooked: a probe that failed has shown nothing, and must be made again.
        new = sites - self._probed_sites
        for site in sorted(new):
            self._hooks.install(site)
        if new:
            self._dead_sites |= self._probe(new)
            self._probed_sites |= new
        if dead := sorted(sites & self._dead_sites):
            raise UnservableInterventionError(
                f"An edit at {', '.join(dead)} does not reach the logits of this model."
            )


def _check_width(site: str, width: int, expected: int) -> None:
    if width != expected:
        raise UnservableInterventionError(
            f"The intervention edits {width} numbers at {site}, where the model has {expected}."
        )
