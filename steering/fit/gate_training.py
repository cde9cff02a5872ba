"""Learns gates together with the LinEAS maps that they scale (end-to-end DSAS, arXiv 2512.03661).

A gate's a and c are parameters beside its map's, and start from the regression of
`steering.fit.gates`. LinEAS's loss C alone would open every gate. A second term keeps the
activations of control sentences as they are in the untouched model, as Zou et al. ("Improving
Alignment and Robustness with Circuit Breakers", 2024) keep them:

    R = 1/L sum_l 1/d_l sum_i mean over sentence i's tokens of || z'_l - z_l ||^2

where z'_l is a token's activation at site l, of width d_l, with all maps and gates active, and z_l
that of the untouched model. The square, and sums and means as in C, give both terms one unit, so
that the loss is C + control_weight R at every batch size and model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from steering.affine import Gate, gate_of
from steering.fit import FitError
from steering.fit.activations import (
    Edits,
    TokenBatch,
    TokenIds,
    model_device,
    pad_right,
    run_sites,
)
from steering.fit.pooling import token_mean


def gated_edit(delta: Tensor, bias: Tensor, gate: Gate, z: Tensor) -> Tensor:
    """Return the served edit at strength 1, `z + gate(z) (delta z + bias)`; differentiable.

    Args:
        delta: (d,) float32, the map's weight - 1.
        bias: (d,) float32.
        gate: of width d.
        z: (..., d) float32.

    Returns:
        (..., d) float32.
    """
    tokens = z.reshape(-1, z.shape[-1])
    gates = gate_of(tokens, gate.weight[None], gate.bias[None])
    return torch.addcmul(tokens, gates, torch.addcmul(bias, delta, tokens)).view_as(z)


def control_loss(model: nn.Module, batch: TokenBatch, edits: Edits) -> Tensor:
    """Return R of the module's docstring, a sum over the batch's sentences.

    Args:
        model: a causal language model.
        batch: control sentences.
        edits: of every site, active together.

    Returns:
        () float32, in squared units of the activations.
    """
    untouched: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}

    def keep(site: str, z: Tensor) -> Tensor:
        untouched[site] = z.float()
        return z

    def measure(site: str, z: Tensor) -> Tensor:
        edited = edits[site](z.float())
        change = (edited - untouched[site]).square()
        changes[site] = token_mean(change, batch.attention_mask).sum(dim=0).mean()
        return edited.to(z.dtype)

    with torch.no_grad():
        run_sites(model, batch, list(edits), keep)
    run_sites(model, batch, list(edits), measure)
    return torch.stack([changes[site] for site in edits]).mean()


class GateTraining:
    """The gates being learnt, with the control sentences."""

    def __init__(
        self, gates: Mapping[str, Gate], control: Sequence[TokenIds], control_weight: float
    ) -> None:
        """Start from given gates.

        Args:
            gates: site -> its gate at the start; not changed.
            control: token ids of sentences whose activations must stay as they are.
            control_weight: weight of R in the loss.

        Raises:
            FitError: there is no control sentence, or the weight is not a positive number.
        """
        if not control:
            raise FitError("the control has no sentence")
        if not (math.isfinite(control_weight) and control_weight > 0):
            raise FitError("control_weight must be a positive number")
        self._gates = {
            site: Gate(_parameter(gate.weight), _parameter(gate.bias))
            for site, gate in gates.items()
        }
        self._control = control
        self._control_weight = control_weight

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        named: dict[str, Tensor] = {}
        for site, gate in self._gates.items():
            named |= {f"gate.weight.{site}": gate.weight, f"gate.bias.{site}": gate.bias}
        return named

    def gate(self, site: str) -> Gate:
        """Return a copy of a site's gate as it is now."""
        gate = self._gates[site]
        return Gate(gate.weight.detach().clone(), gate.bias.detach().clone())

    def edit(self, site: str, delta: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the edit of a site's map, scaled by the site's gate."""
        return partial(gated_edit, delta, bias, self._gates[site])

    def backward(
        self, model: nn.Module, edits: Edits, count: int, micro_batch: int, random: torch.Generator
    ) -> float:
        """Add the gradients of one batch's term of the loss, and return the term.

        Args:
            model: a causal language model.
            edits: of every site, from `edit`.
            count: sentences to draw; all of them if there are fewer.
            micro_batch: sentences in a forward and backward pass.
            random: draws them.
        """
        rows = torch.randperm(len(self._control), generator=random)[:count]
        total = 0.0
        # R is a sum over sentences, so that a batch's gradient is the sum of its parts'.
        for part in torch.split(rows, micro_batch):
            loss = self._term(model, edits, part.tolist()) * (count / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    @torch.no_grad()
    def loss_over_all(self, model: nn.Module, edits: Edits, count: int, micro_batch: int) -> float:
        """Return the term for all control sentences, scaled to `count` of them."""
        parts = torch.split(torch.arange(len(self._control)), micro_batch)
        total = sum(self._term(model, edits, part.tolist()).item() for part in parts)
        return total * count / len(self._control)

    def _term(self, model: nn.Module, edits: Edits, rows: list[int]) -> Tensor:
        batch = pad_right([self._control[row] for row in rows], model_device(model))
        return self._control_weight * control_loss(model, batch, edits)


def _parameter(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
