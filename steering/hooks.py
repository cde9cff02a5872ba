"""Hooks into a model: installed once, they read the current step's route and index the bank."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from steering.bank import Bank
from steering.dose import DoseMeter
from steering.route import Route


class UnknownSiteError(ValueError):
    """A module path that the model does not have."""


class SteeringHooks:
    """Edits a model's activations as the current route says; without a route, does nothing."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._bank: Bank | None = None
        self._route: Route | None = None
        self._meter: DoseMeter | None = None
        lm_head.register_forward_pre_hook(self._before_lm_head)

    @property
    def hooked_sites(self) -> frozenset[str]:
        """The sites that a hook is installed at."""
        return frozenset(self._hooked)

    def install(self, site: str) -> None:
        """Install a site's hook, once.

        Raises:
            UnknownSiteError: the model has no such module.
        """
        if site in self._hooked:
            return
        try:
            module = self._model.get_submodule(site)
        except AttributeError as error:
            raise UnknownSiteError(f"The model has no module {site!r}.") from error
        module.register_forward_hook(self._site_hook(site))
        self._hooked.add(site)

    @contextmanager
    def routed(self, bank: Bank, route: Route, meter: DoseMeter | None = None) -> Iterator[None]:
        """Within the context, the model's forward pass is edited as `route` says.

        A meter, if one is given, learns how large the edits were.
        """
        self._bank, self._route, self._meter = bank, route, meter
        try:
            yield
        finally:
            self._bank = self._route = self._meter = None

    def _site_hook(self, site: str) -> Callable[[nn.Module, object, object], object]:
        def hook(_module: nn.Module, _args: object, output: object) -> object:
            if self._bank is None or self._route is None or not self._route.affine:
                return None
            activations = output[0] if isinstance(output, tuple) else output
            if not isinstance(activations, Tensor):
                raise TypeError(f"the output of {site} is a {type(output).__name__}, not a tensor")
            with self._timed():
                edited = self._bank.edit_site(site, activations, self._route, self._meter)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def _before_lm_head(self, _module: nn.Module, args: tuple[Tensor, ...]) -> object:
        if self._bank is None or self._route is None or not self._route.reward:
            return None
        with self._timed():
            edited = self._bank.edit_rows(args[0], self._route, self._meter)
        return (edited, *args[1:])

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._meter is None else self._meter.editing()


def measure_site_widths(model: nn.Module, vocab_size: int) -> Mapping[str, int]:
    """The width of every module's output that an affine map could edit.

    Runs two tokens through the model and keeps the modules that give one vector a token, in the
    first place of a tuple or alone. `lm_head` gives one vector a *row* and is not among them.

    Returns:
        Module path -> width.
    """
    widths: dict[str, int] = {}

    def recorder(path: str) -> Callable[[nn.Module, object, object], None]:
        def record(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, tuple) and not any(map(_is_per_token, output[1:])):
                output = output[0]
            if isinstance(output, Tensor) and _is_per_token(output):
                widths[path] = output.shape[-1]

        return record

    with ExitStack() as hooks, torch.inference_mode():
        for path, module in model.named_modules():
            if path:
                handle = module.register_forward_hook(recorder(path))
                hooks.callback(handle.remove)
        device = next(model.parameters()).device
        tokens = torch.arange(2, device=device).remainder(vocab_size)[None]
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return widths


def _is_per_token(output: object) -> bool:
    """Whether it is one vector for each of the two tokens."""
    # OPT folds sequences and tokens into one dimension in the middle of its blocks.
    return isinstance(output, Tensor) and output.shape[:-1] in ((1, 2), (2,))
