"""The edits inside a model of vLLM: at sites, and before the logits are computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from server.engine.vllm.plugin.wire import MOST_EDITS, Layout, LoadedEdit
from steering.affine import AffineParameters, MapTable
from steering.bank import Bank
from steering.hooks import edit_activations
from steering.kernels.affine_edit import affine_edit
from steering.reward import RewardHead
from steering.route import AffineRoute, Route, Span, build_route
from steering.settings import SlottedEdit
from steering.sites import locate_site

_CHILD: Final = "steering"  # the name of a site's edit among its module's children
_RowRoute: TypeAlias = Callable[[int], Route]  # a number of logits rows -> their route


class SteeringError(RuntimeError):
    """A step cannot be steered as its requests ask; vLLM ends, so that none is served unsteered."""


class StepTokens(nn.Module):
    """The slot and the strength of each token of a step, at addresses that never change.

    Compiled models and CUDA graphs read these tensors, so a step only overwrites their contents.
    """

    slots: Tensor  # (MOST_EDITS, tokens + 1) int64; 0, the identity, for a token without an edit
    strength: Tensor  # (MOST_EDITS, tokens + 1) float32

    def __init__(self, tokens: int, device: torch.device) -> None:
        """`tokens` is the largest number of tokens in a step, padding included."""
        super().__init__()
        # One more: a compiler that traces a step with as many tokens as there are columns would
        # take the number of tokens for a constant.
        shape = (MOST_EDITS, tokens + 1)
        slots = torch.zeros(shape, dtype=torch.int64, device=device)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("strength", torch.zeros(shape, device=device), persistent=False)

    def fill(self, affine: AffineRoute | None) -> None:
        """Write a step's route; all tokens beyond it, padding too, keep the identity."""
        self.slots.zero_()
        if affine is not None:
            depth, tokens = affine.slots.shape
            self.slots[:depth, :tokens].copy_(_pinned(affine.slots, self.slots), non_blocking=True)
            self.strength[:depth, :tokens].copy_(
                _pinned(affine.strength, self.strength), non_blocking=True
            )


class SteeredSite(nn.Module):
    """Edits a site's activations by the maps that the step's tokens use there."""

    def __init__(self, tokens: StepTokens, table: MapTable) -> None:
        super().__init__()
        self.tokens = tokens
        for name, tensor in table._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Return the edited activations: (tokens, d) -> (tokens, d)."""
        count = activations.shape[0]
        table = MapTable(*(getattr(self, name) for name in MapTable._fields))
        slots, strength = self.tokens.slots[:, :count], self.tokens.strength[:, :count]
        return affine_edit(activations, slots, strength, table)


class SteeredModel:
    """Steers one worker's part of a model. Made after the weights are loaded, before any tracing.

    The worker's runner tells it of each step before the model runs, and whose logits rows are
    computed next. Rows that nobody was told of are an error.
    """

    def __init__(self, model: nn.Module, layout: Layout, width: int, tokens: int) -> None:
        """Install the edits.

        Args:
            model: vLLM's model.
            layout: what to prepare.
            width: that of every site.
            tokens: the largest number of tokens in a step.
        """
        device = next(model.parameters()).device
        self._layout = layout
        self._width = width
        self._digests: dict[int, str] = {}  # slot -> what it holds
        # With pipeline parallelism, a rank has some of the layers.
        modules = dict(model.named_modules())
        self.sites: Final = tuple(
            site for site in layout.sites if locate_site(site).module in modules
        )
        self._bank = Bank(layout.slots, device)
        self._bank.allocate_sites(dict.fromkeys(self.sites, width), all_parts=True)
        self._tokens = StepTokens(tokens, device)
        for site in self.sites:
            self._install(modules[locate_site(site).module], site)
        self._rows: _RowRoute | None = None
        self._has_head = "logits_processor" in modules
        if self._has_head:
            processor = modules["logits_processor"]
            processor.register_forward_pre_hook(self._before_logits, with_kwargs=True)
            processor.register_forward_hook(_mark_rows_without_numbers)

    def _install(self, module: nn.Module, site: str) -> None:
        edit = SteeredSite(self._tokens, self._bank.table(site))
        # As a child, its tensors are the model's own, and a compiler takes them for inputs.
        module.add_module(_CHILD, edit)
        edit_activations(module, locate_site(site), edit)

    def load(self, slot: int, digest: str, parameters: AffineParameters | RewardHead) -> None:
        """Fill a slot. Affine maps at sites of other ranks are left to those ranks.

        Raises:
            SteeringError: a map is at a site that was not prepared, or has another width.
        """
        self._digests.pop(slot, None)
        if isinstance(parameters, RewardHead):
            self._bank.put(slot, parameters)
        else:
            self._check_fit(parameters)
            own = {site: each for site, each in parameters.items() if site in self.sites}
            self._bank.put(slot, own)
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

    def begin_step(self, spans: Sequence[Span]) -> None:
        """Write the route of a step's tokens, and expect the logits of its rows next."""
        route = build_route(spans, torch.device("cpu"))
        self._tokens.fill(route.affine)
        self._rows = partial(self._step_route, route, sum(len(span.rows) for span in spans))

    def _step_route(self, route: Route, expected: int, rows: int) -> Route:
        if rows != expected:
            raise SteeringError(f"logits are computed of {rows} rows, where a step has {expected}")
        self._rows = None
        return route

    @contextmanager
    def scoring(self, edits: tuple[SlottedEdit, ...]) -> Iterator[None]:
        """Within the context, logits rows are those of one request's prompt."""
        self._rows = partial(_route_of_one, edits)
        try:
            yield
        finally:
            self._rows = None

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within the context, nothing is edited: vLLM runs the model without requests."""
        self._tokens.fill(None)
        self._rows = partial(_route_of_one, ())
        try:
            yield
        finally:
            self._rows = None

    def _before_logits(
        self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        head, hidden, *others = args
        if self._rows is None:
            raise SteeringError("logits are computed of rows that belong to no known request")
        assert isinstance(hidden, Tensor), "vLLM calls its logits processor with hidden states"
        route = self._rows(hidden.shape[0])
        if route.reward:
            hidden = self._bank.edit_rows(hidden, route)
        return (head, hidden, *others), kwargs


def _route_of_one(edits: tuple[SlottedEdit, ...], rows: int) -> Route:
    span = Span(start=0, count=0, prompt_length=0, rows=range(rows), edits=edits)
    return build_route([span], torch.device("cpu"))


def _mark_rows_without_numbers(_module: nn.Module, _args: object, logits: Tensor | None) -> None:
    """Make every logit NaN in rows whose largest is not finite: vLLM counts NaN only.

    `logits` is None on ranks of a tensor-parallel group that get no logits.
    """
    if logits is not None:
        broken = ~logits.amax(dim=-1, keepdim=True).isfinite()
        logits.masked_fill_(broken, torch.nan)


def _pinned(tensor: Tensor, target: Tensor) -> Tensor:
    """Return a tensor that can be copied to the target's device without waiting.

    Every step's is new, so that no step overwrites what the copy of the step before still reads.
    """
    return tensor.pin_memory() if target.is_cuda else tensor
