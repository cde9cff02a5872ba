"""Reads pooled activations at sites from a model, for fits.

A site is a module's output, or its input (see `steering.sites`). Activations are pooled over a
sequence's tokens as soon as their site is reached, so that those of one site and one batch are in
memory at a time (and, where gradients are wanted, what the backward pass needs).

The model is any causal language model called as `model(input_ids=..., attention_mask=...)`.
Sequences are padded on the right, so that neither positions nor causal attention see the padding.
Every function removes its hooks when it returns or raises.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from steering.fit import FitError
from steering.fit.pooling import Pooling, pool_tokens
from steering.hooks import NoTensorError, edit_activations
from steering.sites import locate_site

TokenIds: TypeAlias = Sequence[int]
SiteEdit: TypeAlias = Callable[[str, Tensor], Tensor]
"""(site, its activations) -> the activations to use; the same tensor if nothing is edited."""
Edits: TypeAlias = Mapping[str, Callable[[Tensor], Tensor]]
"""Site -> function of its activations, (n, t, d) float32. Other sites stay as they are."""
OnBatch: TypeAlias = Callable[[int, int], None]
"""Called after each forward pass with (sequences done, sequences in all)."""


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


def run_sites(model: nn.Module, batch: TokenBatch, sites: Sequence[str], edit: SiteEdit) -> None:
    """Run the model up to its last site, and pass every site's activations through `edit`.

    Nothing after the last site is computed. This saves `lm_head`, the largest matrix of a small
    model.

    Args:
        model: a causal language model.
        batch: its input.
        sites: outputs and inputs of modules. They are tensors (n, t, d), or (n * t, d); an output
            may be a tuple that starts with one.
        edit: called once for each site with (n, t, d), in the order in which the model runs them.

    Raises:
        FitError: the model has no module of this path, or does not run it, or what is at the site
            is not a tensor.
    """
    remaining = set(sites)

    def edited(site: str, activations: Tensor) -> Tensor:
        # OPT folds sequences and tokens into one dimension in the middle of its blocks.
        result = edit(site, activations.reshape(*batch.input_ids.shape, -1))
        remaining.discard(site)
        if not remaining:
            raise _StopForwardError
        return result.reshape(activations.shape)

    with ExitStack() as hooks:
        for site in sites:
            location = locate_site(site)
            module = _submodule(model, location.module)
            hooks.enter_context(edit_activations(module, location, partial(edited, site)))
        try:
            _run_until_stopped(model, batch)
        except NoTensorError as error:
            raise FitError(f"{error}: choose another site") from error
    if remaining:
        raise FitError(f"the model does not run {', '.join(sorted(remaining))}")


@torch.no_grad()
def collect_token_means(
    model: nn.Module,
    sites: Sequence[str],
    sequences: Sequence[TokenIds],
    batch_size: int,
    pooling: Pooling = "mean",
    edits: Edits | None = None,
    on_batch: OnBatch | None = None,
) -> dict[str, Tensor]:
    """Return the pooled activations of any number of sequences, `batch_size` in a forward pass.

    Sequences of like length share a pass, so that little of it is padding.

    Args:
        model: a causal language model.
        sites: outputs and inputs of modules.
        sequences: token ids.
        batch_size: sequences in a forward pass; what bounds the memory.
        pooling: how a sequence's tokens become one vector.
        edits: see `site_token_means`; None leaves the model untouched.
        on_batch: called after each pass.

    Returns:
        site -> (len(sequences), d) float32, on the model's device.

    Raises:
        FitError: the model has no such site, there is no sequence, or one has no token.
    """
    if not sequences:
        raise FitError("there is no sequence to fit on")
    collected: dict[str, list[Tensor]] = {site: [] for site in sites}
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad_right([sequences[row] for row in rows], model_device(model))
        for site, pooled in site_token_means(model, sites, batch, edits, pooling).items():
            collected[site].append(pooled)
        if on_batch is not None:
            on_batch(start + len(rows), len(order))
    places = torch.tensor(order).argsort().to(model_device(model))
    return {site: torch.cat(pooled)[places] for site, pooled in collected.items()}


def site_token_means(
    model: nn.Module,
    sites: Sequence[str],
    batch: TokenBatch,
    edits: Edits | None = None,
    pooling: Pooling = "mean",
) -> dict[str, Tensor]:
    """Return each site's pooled activations *after* its edit, with all edits active at once.

    Args:
        model: a causal language model.
        sites: outputs and inputs of modules.
        batch: n sequences.
        edits: the sites to edit, all of them among `sites`; None: no edits. Later sites see the
            edited activations, in the model's dtype.
        pooling: how a sequence's tokens become one vector.

    Returns:
        site -> (n, d) float32.
    """
    pooled: dict[str, Tensor] = {}

    def measure(site: str, z: Tensor) -> Tensor:
        if edits is None or site not in edits:
            pooled[site] = pool_tokens(z, batch.attention_mask, pooling)
            return z
        edited = edits[site](z.float())
        pooled[site] = pool_tokens(edited, batch.attention_mask, pooling)
        return edited.to(z.dtype)

    run_sites(model, batch, sites, measure)
    return pooled


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


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FitError(f"the model has no module {path}") from error


def _run_until_stopped(model: nn.Module, batch: TokenBatch) -> None:
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    except _StopForwardError:
        return
