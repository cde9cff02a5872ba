"""The edits inside a model of vLLM: at sites, and before the logits are computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from server.engine.vllm.plugin.measuring import Measuring
from server.engine.vllm.plugin.site_edits import SteeredSite, StepBuffers
from server.engine.vllm.plugin.wire import Layout, LoadedEdit
from steering.affine import AffineParameters
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.reward import RewardHead
from steering.route import AffineRoute, Route, Span, build_route
from steering.settings import SlottedEdit
from steering.site_maps import MapPart
from steering.sites import locate_site

# A number of logits rows -> their route, and the meter of their edits if they are measured.
RowRoute: TypeAlias = Callable[[int], tuple[Route, DoseMeter | None]]


class SteeringError(RuntimeError):
    """A step cannot be steered as its requests ask; vLLM ends, so that none is served unsteered."""


class SteeredModel:
    """Steers one worker's part of a model. Made after the weights are loaded, before any tracing.

    The worker's runner tells it of each step before the model runs, and whose logits rows are
    computed next. Rows that nobody was told of are an error.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, width: int, tokens: int, *, is_compiled: bool
    ) -> None:
        """Install the edits.

        Args:
            model: vLLM's model.
            layout: what to prepare.
            width: that of every site.
            tokens: the largest number of tokens in a step.
            is_compiled: True if vLLM is to compile the model.
        """
        device = next(model.parameters()).device
        self._layout = layout
        self._width = width
        self._digests: dict[int, str] = {}  # slot -> what it holds
        self.loads = 0  # how often a slot was filled, or was to be
        # With pipeline parallelism, a rank has some of the layers.
        modules = dict(model.named_modules())
        self.sites: Final = tuple(
            site for site in layout.sites if locate_site(site).module in modules
        )
        self._bank = Bank(layout.slots, device)
        self._bank.allocate_sites(dict.fromkeys(self.sites, width), all_parts=True)
        inlines = is_compiled and device.type == "cpu"
        self._buffers = StepBuffers(tokens, len(self.sites), device, inlines=inlines)
        self._is_simple = torch.zeros(
            layout.slots + 1, dtype=torch.bool
        )  # by slot, see StepBuffers
        for index, site in enumerate(self.sites):
            location, table = locate_site(site), self._bank.table(site)
            SteeredSite.install(modules[location.module], location, self._buffers, index, table)
        self._flags_of: tuple[frozenset[int], int] | None = None
        self.measuring = Measuring(self._buffers)
        self._rows: RowRoute | None = None
        self._has_head = "logits_processor" in modules
        if self._has_head:
            processor = modules["logits_processor"]
            processor.register_forward_pre_hook(self._before_logits, with_kwargs=True)
            processor.register_forward_hook(_mark_rows_without_numbers)

    def load(self, slot: int, digest: str, parameters: AffineParameters | RewardHead) -> None:
        """Fill a slot. Affine maps at sites of other ranks are left to those ranks.

        Raises:
            SteeringError: a map is at a site that was not prepared, or has another width.
        """
        self.loads += 1
        self._digests.pop(slot, None)
        if isinstance(parameters, RewardHead):
            self._bank.put(slot, parameters)
        else:
            self._check_fit(parameters)
            own = {site: each for site, each in parameters.items() if site in self.sites}
            self._bank.put(slot, own)
            parts = {each.part for each in self._bank.parts_used([slot])}
            self._is_simple[slot] = parts <= {MapPart.MAP}
        self._digests[slot] = digest

    def _check_fit(self, maps: AffineParameters) -> None:
        if others := sorted(maps.keys() - set(self._layout.sites)):
            raise SteeringError(f"the site {others[0]} was not prepared when vLLM started")
        for site, each in maps.items():
            if each.weight.numel() != self._width:
                raise SteeringError(
                    f"the map at {site} has width {each.weight.numel()}, the site {self._width}"
                )

    def slotted(self, edits: Sequence[LoadedEdit]) -> tuple[SlottedEdit, ...]:
        """Return a request's edits.

        Raises:
            SteeringError: a slot does not hold what the request was promised.
        """
        for edit in edits:
            if self._digests.get(edit.slot) != edit.digest:
                raise SteeringError(f"slot {edit.slot} does not hold {edit.digest}")
        return tuple(SlottedEdit(edit.slot, edit.settings) for edit in edits)

    def begin_step(self, spans: Sequence[Span], names: Sequence[str]) -> None:
        """Write the route of a step's tokens, and expect the logits of its rows next.

        Args:
            spans: the step's.
            names: of the spans' requests, as what is measured tells them.
        """
        route = build_route(spans, torch.device("cpu"))
        is_measured = self.measuring.begin(spans, names, route)
        self._buffers.fill(route.affine, self._simple_tokens(route.affine), is_measured=is_measured)
        if route.affine is not None:
            self._fill_flags(route.affine)
        self._rows = partial(self._step_route, route, sum(len(span.rows) for span in spans))

    def _simple_tokens(self, affine: AffineRoute | None) -> Tensor | None:
        """Return which tokens are simple, see `StepBuffers`; None if none is edited as such."""
        if affine is None or not self._buffers.inlines:
            return None
        has_one_edit = (affine.slots != 0).sum(dim=0) == 1
        return has_one_edit & self._is_simple[affine.slots.sum(dim=0).where(has_one_edit, 0)]

    def _fill_flags(self, affine: AffineRoute) -> None:
        """Write which parts of maps the step's slots have at each site, unless it is known."""
        assert affine.used_slots is not None, "a step's route knows its slots"
        key = (affine.used_slots, self.loads)
        if self._flags_of != key:
            self._buffers.fill_flags(self._bank.flags_at(self.sites, affine.used_slots))
            self._flags_of = key

    def _step_route(self, route: Route, expected: int, rows: int) -> tuple[Route, DoseMeter | None]:
        if rows != expected:
            raise SteeringError(f"logits are computed of {rows} rows, where a step has {expected}")
        self._rows = None
        return route, self.measuring.meter

    @contextmanager
    def rows_by(self, rows: RowRoute) -> Iterator[None]:
        """Within the context, ask a function for the route of each set of logits rows."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    @contextmanager
    def scoring(self, edits: tuple[SlottedEdit, ...]) -> Iterator[None]:
        """Within the context, logits rows are those of one request's prompt."""
        with self.rows_by(partial(_route_of_one, edits)):
            yield

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within the context, nothing is edited: vLLM runs the model without requests."""
        self._buffers.fill(None)
        with self.rows_by(partial(_route_of_one, ())):
            yield

    def _before_logits(
        self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        head, hidden, *others = args
        if self._rows is None:
            raise SteeringError("logits are computed of rows that belong to no known request")
        assert isinstance(hidden, Tensor), "vLLM calls its logits processor with hidden states"
        route, meter = self._rows(hidden.shape[0])
        if route.reward:
            with nullcontext() if meter is None else meter.timing_edits():
                hidden = self._bank.edit_rows(hidden, _sent(route, hidden.device), meter)
        return (head, hidden, *others), kwargs


def _route_of_one(edits: tuple[SlottedEdit, ...], rows: int) -> tuple[Route, None]:
    span = Span(start=0, count=0, prompt_length=0, rows=range(rows), edits=edits)
    return build_route([span], torch.device("cpu")), None


def _mark_rows_without_numbers(_module: nn.Module, _args: object, logits: Tensor | None) -> None:
    """Make every logit NaN in rows whose largest is not finite: vLLM counts NaN only.

    `logits` is None on ranks of a tensor-parallel group that get no logits.
    """
    if logits is not None:
        broken = ~logits.amax(dim=-1, keepdim=True).isfinite()
        logits.masked_fill_(broken, torch.nan)


def _sent(route: Route, device: torch.device) -> Route:
    """Return the route on a device, without waiting for it."""
    if device.type != "cuda":
        return route
    copies = [each.pin_memory().to(device, non_blocking=True) for each in route.tensors()]
    return route.with_tensors(copies, device)
