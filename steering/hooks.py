"""Hooks that edit a model. Installed once, they read the current route and index the bank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering.bank import Bank
from steering.dose import DoseMeter
from steering.route import Route
from steering.sites import SiteLocation, locate_site


class UnknownSiteError(ValueError):
    """The model has no module for a site."""


class NoTensorError(TypeError):
    """A module's output or input, which is to be edited, is not a tensor."""


class SteeringHooks:
    """Edits a model's activations by the current route; does nothing outside `routed`."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._bank: Bank | None = None
        self._route: Route | None = None
        self._meter: DoseMeter | None = None
        lm_head.register_forward_pre_hook(self._before_lm_head)

    def install(self, site: str) -> None:
        """Install a site's hook, once.

        Raises:
            UnknownSiteError: the model has no such module.
        """
        if site in self._hooked:
            return
        location = locate_site(site)
        try:
            module = self._model.get_submodule(location.module)
        except AttributeError as error:
            raise UnknownSiteError(f"The model has no module {location.module!r}.") from error
        edit_activations(module, location, partial(self._edit_site, site))
        self._hooked.add(site)

    @contextmanager
    def routed(self, bank: Bank, route: Route, meter: DoseMeter | None = None) -> Iterator[None]:
        """Edit the model's forward pass by `route` within the context.

        A meter, if given, records the edits' doses and their time.
        """
        self._bank, self._route, self._meter = bank, route, meter
        try:
            yield
        finally:
            self._bank = self._route = self._meter = None

    def _edit_site(self, site: str, activations: Tensor) -> Tensor:
        bank, route, meter = self._bank, self._route, self._meter
        if bank is None or route is None or route.affine is None:
            return activations
        if meter is None or activations.device.type != "cpu":
            return bank.edit_site(site, activations, route, meter)
        with meter.timing_edits():
            edited = bank.edit_site(site, activations, route)
        # Doses are measured in a second edit, so that the first is timed without measuring.
        with meter.timing_measurements():
            bank.edit_site(site, activations, route, meter)
        return edited

    def _before_lm_head(self, _module: nn.Module, args: tuple[Tensor, ...]) -> object:
        if self._bank is None or self._route is None or not self._route.reward:
            return None
        timed = nullcontext() if self._meter is None else self._meter.timing_edits()
        with timed:
            edited = self._bank.edit_rows(args[0], self._route, self._meter)
        return (edited, *args[1:])


def edit_activations(
    module: nn.Module, location: SiteLocation, edit: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """Register a hook that passes a module's output, or its input, through `edit`.

    If the output is a tuple, its first item is edited. The input is the module's first argument,
    given by position or by name.

    The hook raises NoTensorError if what it should edit is not a tensor.
    """

    def edit_tensor(activations: object) -> Tensor:
        if not isinstance(activations, Tensor):
            kind = type(activations).__name__
            place = "input" if location.is_input else "output"
            raise NoTensorError(f"the {place} of {location.module} is a {kind}, not a tensor")
        return edit(activations)

    def edit_output(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (edit_tensor(output[0]), *output[1:])
        return edit_tensor(output)

    def edit_input(
        _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if args:
            return (edit_tensor(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: edit_tensor(kwargs[name])}

    if location.is_input:
        return module.register_forward_pre_hook(edit_input, with_kwargs=True)
    return module.register_forward_hook(edit_output)
