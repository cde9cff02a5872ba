"""Manages the loaded interventions: keeps the bank, the slot table and the hooks consistent."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeAlias

import torch

from interventions.model import ModelDescription
from server.engine.errors import UnservableInterventionError
from server.engine.slots import SlotTable
from server.engine.torch.site_probes import SiteProbes
from steering.affine import AffineParameters
from steering.bank import Bank
from steering.reward import RewardHead

Parameters: TypeAlias = AffineParameters | RewardHead

_TEMPORARY: Final = ""  # stands in for a digest; no artifact has it
_MAX_NAMED: Final = 8  # most sites that an error message names


class LoadedInterventions:
    """Loads interventions into slots of the bank. Used on the engine thread only."""

    def __init__(
        self, capacity: int, model: ModelDescription, device: torch.device, probes: SiteProbes
    ) -> None:
        self._model = model
        self.bank = Bank(capacity, device)
        self.slots = SlotTable(capacity)
        self._probes = probes

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Return the interventions that are not loaded."""
        return {digest for digest in digests if not self.slots.is_loaded(digest)}

    def pin_or_install(self, digest: str, parameters: Mapping[str, Parameters]) -> int:
        """Pin an intervention, installing it if it is not loaded, and return its slot.

        Raises what `install` raises.
        """
        slot = self.slots.pin(digest)
        return self.install(digest, parameters[digest]) if slot is None else slot

    def prepare(self, parameters: Parameters, seconds: float) -> bool:
        """Probe a few of an intervention's new sites, for about `seconds`.

        Returns:
            True if no site is left to probe, so that `install` need not probe.

        Raises:
            UnservableInterventionError: it does not fit the model, or an edit at one of its sites
                does not reach the logits.
        """
        self._check_fit(parameters)
        if not isinstance(parameters, Mapping):
            return True
        self._check_alive(parameters)
        new = self._probes.probe_some(parameters, seconds)
        self._check_alive(parameters)
        self.bank.allocate_sites({site: self._model.site_widths[site] for site in new})
        return not self._probes.unprobed(parameters)

    def install(self, digest: str, parameters: Parameters) -> int:
        """Probe the sites that are left, put the intervention into a slot, and pin it.

        Raises:
            BankFullError: every slot is pinned.
            UnservableInterventionError: it does not fit the model, or an edit at one of its sites
                does not reach the logits.
        """
        self._check_fit(parameters)
        if isinstance(parameters, Mapping):
            self._probes.probe_all(parameters)
            self._check_alive(parameters)
        slot = self.slots.take(digest)
        try:
            self.bank.put(slot, parameters)
        except BaseException:
            self.slots.drop(digest)
            raise
        return slot

    @contextmanager
    def temporarily_installed(self, parameters: Parameters) -> Iterator[int]:
        """Install an intervention for the duration of the context, and yield its slot.

        The engine uses it to warm up. Its sites stay hooked, probed, and allocated in the bank
        afterwards. Raises what `install` raises.
        """
        slot = self.install(_TEMPORARY, parameters)
        try:
            yield slot
        finally:
            self.slots.drop(_TEMPORARY)
            self.bank.clear(slot)

    def _check_fit(self, parameters: Parameters) -> None:
        # The registry checks its artifacts against the model; other parameters arrive unchecked.
        if isinstance(parameters, Mapping):
            widths = self._model.site_widths
            for site, site_map in parameters.items():
                if site not in widths:
                    raise UnservableInterventionError(f"The model has no site {site!r}.")
                _check_width(site, site_map.weight.numel(), widths[site])
        else:
            _check_width("lm_head", parameters.direction.numel(), self._model.head_width)

    def _check_alive(self, sites: Collection[str]) -> None:
        if dead := self._probes.dead(sites):
            named = f"{', '.join(dead[:_MAX_NAMED])}{', ...' if len(dead) > _MAX_NAMED else ''}"
            raise UnservableInterventionError(
                f"An edit at {named} does not reach the logits of this model."
            )


def _check_width(site: str, width: int, expected: int) -> None:
    if width != expected:
        raise UnservableInterventionError(
            f"The intervention edits {width} numbers at {site}, where the model has {expected}."
        )
