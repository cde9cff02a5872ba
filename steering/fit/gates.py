"""Fits gates, which say for each token how much of a map's edit it gets.

Ferrando et al., "Dynamically Scaled Activation Steering" (DSAS, arXiv 2512.03661): at each site a
logistic regression tells the token-mean activations of source sentences, which are to be edited,
from those of control sentences, which must stay as they are. With few sentences and many
coordinates it would overfit, hence it sees their first principal components only. Mean,
components, standardisation and regression are all affine, so they fold into one a and one c:

    sigmoid(w . (V^T (z - mean) / std) + w0)  =  sigmoid(a . z + c),
    a = V (w / std),   c = w0 - a . mean

Gates are fitted on the *untouched* model's activations, with no map active at earlier sites. The
gate then depends on the texts alone, not on a map or its strength, which requests choose. (With
maps at full strength, a source sentence would look like a target sentence at late sites: the gate
would learn to tell apart activations that occur only where gates were open before.)
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steering.affine import Gate, gate_of
from steering.fit import FitError
from steering.fit.activations import OnBatch, TokenIds, collect_token_means, frozen
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import GateTexts
from steering.fit.logistic import fit_logistic
from steering.fit.pooling import Pooling

_FORWARD_BATCH = 32  # sequences in one forward pass


def fit_gates(
    model: nn.Module,
    sites: Sequence[str],
    texts: GateTexts,
    settings: GateSettings,
    on_batch: OnBatch | None = None,
) -> dict[str, Gate]:
    """Learn a gate for each site, open on source sentences and closed on control sentences.

    The same inputs give the same gates on the same machine and number of threads.

    Args:
        model: a causal language model; not changed.
        sites: the sites of the maps.
        texts: the sentences, see `split_texts`.
        settings: the regressions' settings.
        on_batch: called while sentences are read.

    Returns:
        site -> its gate, float32 on the model's device.

    Raises:
        FitError: the model lacks a site, or activations at a site are not finite or all equal.
    """
    source, control = _pooled(model, sites, texts.source, texts.control, settings.pooling, on_batch)
    return {site: fit_gate(source[site], control[site], settings, site) for site in sites}


def held_out_accuracy(
    model: nn.Module,
    gates: Mapping[str, Gate],
    texts: GateTexts,
    on_batch: OnBatch | None = None,
    pooling: Pooling = "mean",
) -> dict[str, float]:
    """Return how often each gate is right about sentences that it was not fitted on.

    A gate is right where it is above 0.5 on a source sentence's pooled activation, or at most 0.5
    on a control sentence's. The two sides count equally, however many sentences each has: a gate
    that is always open, or always closed, has 0.5.

    Returns:
        site -> the mean of both sides' shares, from 0 to 1.

    Raises:
        FitError: the model lacks a site, or activations at a site are not finite.
    """
    source, control = _pooled(
        model, list(gates), texts.held_out_source, texts.held_out_control, pooling, on_batch
    )
    return {
        site: (_share_open(gate, source[site]) + 1 - _share_open(gate, control[site])) / 2
        for site, gate in gates.items()
    }


def fit_gate(source: Tensor, control: Tensor, settings: GateSettings, site: str) -> Gate:
    """Fit one site's gate.

    Both sides count equally, so that the gate does not depend on how much neutral text there is.

    Args:
        source: (m, d) float32, the activations for which the gate opens.
        control: (k, d) float32, those for which it closes.
        settings: the regression's settings; `components` at most m + k - 1.
        site: its name, for messages.

    Returns:
        The gate, float32 on the device of `source`; computed in float64 on the CPU.

    Raises:
        FitError: all activations are equal.
    """
    rows = torch.cat([source, control]).to("cpu", torch.float64)
    mean = rows.mean(dim=0)
    # Components beyond the activations' rank have no direction and no variance to standardise by.
    smallest = rows.abs().max() * max(rows.shape) * torch.finfo(source.dtype).eps
    basis = _standardised_components(rows - mean, settings.components, float(smallest))
    if basis.shape[1] == 0:
        raise FitError(f"all activations at {site} are equal: no gate can tell source from control")
    features = ((rows - mean) @ basis)[None]
    closed, opened = features[:, len(source) :], features[:, : len(source)]
    fitted = fit_logistic(closed, opened, settings.l2, balanced=True)
    weight = basis @ fitted.weights[0]
    bias = fitted.intercepts[0] - weight @ mean
    return Gate(weight.to(source), bias.to(source))


def _standardised_components(centred: Tensor, count: int, smallest: float) -> Tensor:
    """Return the first principal components, each divided by its standard deviation.

    From the eigenvectors of the smaller of the two products of the rows with themselves, which
    takes a fraction of the time of a singular value decomposition.

    Args:
        centred: (n, d) float64, of mean 0.
        count: the number of components.
        smallest: components whose singular value is not larger are left out.

    Returns:
        (d, k) float64, k at most `count`.
    """
    n, d = centred.shape
    squares, vectors = torch.linalg.eigh(centred @ centred.T if n < d else centred.T @ centred)
    singular = squares.flip(0).clamp(min=0).sqrt()[:count]
    singular = singular[singular > smallest]
    vectors = vectors.flip(1)[:, : len(singular)]
    components = centred.T @ vectors / singular if n < d else vectors
    standardised: Tensor = components / (singular / math.sqrt(n))
    return standardised


def _pooled(
    model: nn.Module,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    control: Sequence[TokenIds],
    pooling: Pooling,
    on_batch: OnBatch | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the untouched model's pooled activations of both sides."""
    sentences = [*source, *control]
    with frozen(model):
        means = collect_token_means(
            model, sites, sentences, _FORWARD_BATCH, pooling, on_batch=on_batch
        )
    for site, rows in means.items():
        if not torch.isfinite(rows).all():
            raise FitError(
                f"activations at {site} are not finite: use a wider --dtype, or leave the site out"
            )
    of_source = {site: rows[: len(source)] for site, rows in means.items()}
    return of_source, {site: rows[len(source) :] for site, rows in means.items()}


def _share_open(gate: Gate, rows: Tensor) -> float:
    gates = gate_of(rows, gate.weight[None], gate.bias[None])
    return float((gates > 0.5).double().mean())
