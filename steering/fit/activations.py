"""Reads from a model what a fit needs: token means at sites, and hidden states before the head.

The model is any causal language model called as `model(input_ids=..., attention_mask=...)`.
Sequences are padded on the right, so that neither positions nor causal attention see the padding.
Every function removes its hooks when it returns or raises.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from steering.fit import FitError

TokenIds: TypeAlias = Sequence[int]
OutputEdit: TypeAlias = Callable[[str, Tensor], Tensor]
"""(site, its output) -> the output to use instead; the same tensor if nothing is edited."""


class _StopForwardError(Exception):
    """Ends a forward pass early. Always caught in this module."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Sequences padded on the right to a common length t."""

    input_ids: Tensor  # (n, t) int64
    attention_mask: Tensor  # (n, t) int64, 1 for a token and 0 for padding


def pad_right(sequences: Sequence[TokenIds], device: torch.device) -> TokenBatch:
    """Return sequences as one batch.

    Raises:
        FitError: there is no sequence, or one has no token.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise FitError("a sequence to fit on has no token")
    input_ids = pad_sequence([torch.tensor(each) for each in sequences], batch_first=True)
    is_token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TokenBatch(input_ids.to(device), is_token.long().to(device))


def token_mean(z: Tensor, attention_mask: Tensor) -> Tensor:
    """Return each sequence's mean over its own tokens: (n, t, d) -> (n, d) float32."""
    mask = attention_mask[:, :, None].float()
    return (z.float() * mask).sum(dim=1) / mask.sum(dim=1)


def run_sites(model: nn.Module, batch: TokenBatch, sites: Sequence[str], edit: OutputEdit) -> None:
    """Run the model up to its last site, and pass every site's output through `edit`.

    Nothing after the last site is computed. This saves `lm_head`, the largest matrix of a small
    model.

    Args:
        model: a causal language model.
        batch: its input.
        sites: module paths; a site's output is a tensor (n, t, d), or (n * t, d), or a tuple that
            starts with one.
        edit: called once for each site with (n, t, d), in the order in which the model runs them.

    Raises:
        FitError: the model has no module of this path, or does not run it.
    """
    remaining = set(sites)

    def edited(site: str, output: Tensor) -> Tensor:
        # OPT folds sequences and tokens into one dimension in the middle of its blocks.
        result = edit(site, output.view(*batch.input_ids.shape, -1)).view_as(output)
        remaining.discard(site)
        if not remaining:
            raise _StopForwardError
        return result

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(_hook_output(_submodule(model, site), site, edited))
        _run_until_stopped(model, batch)
    if remaining:
        raise FitError(f"the model does not run {', '.join(sorted(remaining))}")


@torch.no_grad()
def collect_token_means(
    model: nn.Module, sites: Sequence[str], sequences: Sequence[TokenIds], batch_size: int
) -> dict[str, Tensor]:
    """Return the token-mean activations of the untouched model.

    Returns:
        site -> (len(sequences), d) float32, on the model's device.

    Raises:
        FitError: the model has no such site, or a sequence has no token.
    """
    collected: dict[str, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(sequences), batch_size):
        batch = pad_right(sequences[start : start + batch_size], model_device(model))
        for site, means in site_token_means(model, sites, batch).items():
            collected[site].append(means)
    return {site: torch.cat(means) for site, means in collected.items()}


def site_token_means(
    model: nn.Module,
    sites: Sequence[str],
    batch: TokenBatch,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the token means of each site's output *after* its edit, with all edits active at once.

    Args:
        model: a causal language model.
        sites: module paths.
        batch: n sequences.
        edits: site -> function of its output, (n, t, d) float32; None: no edits. Later sites see
            the edited activations, in the model's dtype.

    Returns:
        site -> (n, d) float32.
    """
    means: dict[str, Tensor] = {}

    def measure(site: str, z: Tensor) -> Tensor:
        if edits is None:
            means[site] = token_mean(z, batch.attention_mask)
            return z
        edited = edits[site](z.float())
        means[site] = token_mean(edited, batch.attention_mask)
        return edited.to(z.dtype)

    run_sites(model, batch, sites, measure)
    return means


@torch.no_grad()
def collect_hidden_states(
    model: nn.Module,
    head: nn.Module,
    sequences: Sequence[TokenIds],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Return the untouched model's hidden states before the language-model head, for every token.

    Args:
        model: a causal language model.
        head: its language-model head (`lm_head`), a submodule that takes the hidden states as its
            first argument. It is not run.
        sequences: token ids.
        batch_size: sequences in a forward pass.
        on_batch: called after every forward pass with (sequences done, sequences in all).

    Returns:
        One (tokens, width) float32 tensor for each sequence, on the model's device; width is the
        head's `in_features`.

    Raises:
        FitError: a sequence has no token, or the model does not run the head.
    """
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0].float())
        raise _StopForwardError

    states: list[Tensor] = []
    for start in range(0, len(sequences), batch_size):
        chunk = sequences[start : start + batch_size]
        with head.register_forward_pre_hook(capture):
            _run_until_stopped(model, pad_right(chunk, model_device(model)))
        if not captured:
            raise FitError("the model does not run its language-model head")
        padded = captured.pop()
        # A copy, not a view: a view would keep the padding's memory alive.
        states += [padded[row, : len(tokens)].clone() for row, tokens in enumerate(chunk)]
        if on_batch is not None:
            on_batch(len(states), len(sequences))
    return states


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode, its parameters without gradients, within the context."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, on which its token ids must be."""
    return next(model.parameters()).device


def _submodule(model: nn.Module, site: str) -> nn.Module:
    try:
        return model.get_submodule(site)
    except AttributeError as error:
        raise FitError(f"the model has no module {site}") from error


def _hook_output(module: nn.Module, site: str, edit: OutputEdit) -> RemovableHandle:
    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (edit(site, output[0]), *output[1:])
        if isinstance(output, Tensor):
            return edit(site, output)
        raise FitError(f"{site} returns a {type(output).__name__}, not a tensor")

    return module.register_forward_hook(hook)


def _run_until_stopped(model: nn.Module, batch: TokenBatch) -> None:
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    except _StopForwardError:
        return
