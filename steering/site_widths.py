"""Finds a model's sites: the outputs and inputs of modules that are one vector for each token."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from steering.sites import input_site


def measure_site_widths(model: nn.Module, vocab_size: int) -> Mapping[str, int]:
    """Return the width of every site that an affine map could edit.

    Runs two tokens through the model. A module's output is a site if it (or a tuple's first item,
    and no other) is one vector for each token. A module's input is a site if its first argument is
    one vector for each token. `lm_head` takes and gives one vector for each logits row, so neither
    is a site.

    Returns:
        Site -> width. A name that is both a module's input and another module's output is left
        out.
    """
    widths: dict[str, int] = {}
    modules = {path: module for path, module in model.named_modules() if path}
    with ExitStack() as hooks, torch.inference_mode():
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_hook(_output_recorder(path, widths)))
            recorder = _input_recorder(input_site(path), widths)
            hooks.enter_context(module.register_forward_pre_hook(recorder, with_kwargs=True))
        device = next(model.parameters()).device
        tokens = torch.arange(2, device=device).remainder(vocab_size)[None]
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    ambiguous = modules.keys() & {input_site(path) for path in modules}
    return {site: width for site, width in widths.items() if site not in ambiguous}


def _output_recorder(
    site: str, widths: dict[str, int]
) -> Callable[[nn.Module, object, object], None]:
    def record(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, tuple) and not any(map(_is_per_token, output[1:])):
            output = output[0]
        if isinstance(output, Tensor) and _is_per_token(output):
            widths[site] = output.shape[-1]

    return record


def _input_recorder(
    site: str, widths: dict[str, int]
) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    def record(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, Tensor) and _is_per_token(first):
            widths[site] = first.shape[-1]

    return record


def _is_per_token(activations: object) -> bool:
    """Return whether a value is one vector for each of the two tokens."""
    # OPT folds sequences and tokens into one dimension in the middle of its blocks.
    return (
        isinstance(activations, Tensor)
        and activations.is_floating_point()
        and activations.shape[:-1] in ((1, 2), (2,))
    )
