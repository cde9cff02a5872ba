"""The maps of a LinEAS fit while they are learnt: loss, gradients, one step, and the whole state.

A map is held as `delta = w - 1` and `bias`, so that the identity is zero: weight decay and sparsity
pull towards the identity, and what they take away is exactly zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.activations import (
    Edits,
    TokenIds,
    collect_token_means,
    model_device,
    pad_right,
    site_token_means,
)
from steering.fit.gate_training import GateTraining
from steering.fit.lineas_settings import LineasSettings
from steering.fit.optimizers import (
    make_optimizer,
    optimizer_shapes,
    optimizer_state,
    restore_optimizer,
)
from steering.fit.sparsity import proximal_step
from steering.fit.wasserstein import distributional_loss

State: TypeAlias = Mapping[str, Tensor]
"""All that a fit needs to go on, by name. Its tensors may be on any device."""

_STEP: Final = "step"  # () int64, steps done
_RANDOM: Final = "random"  # (bytes,) uint8, the state of the generator that draws batches


class LineasTraining:
    """The maps being learnt, with the sentences that they are learnt from."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        source: Sequence[TokenIds],
        target: Sequence[TokenIds],
        settings: LineasSettings,
        random: torch.Generator,
        gating: GateTraining | None = None,
    ) -> None:
        """Read the target's activations, and start from the identity, with `gating`'s gates.

        Raises:
            FitError: a sentence has no token, or the model has no such site.
        """
        self._model = model
        self._source = source
        self._settings = settings
        self._random = random
        self._gating = gating
        self._micro_batch = settings.sentences_in_a_pass
        self._target = collect_token_means(
            model, sites, target, self._micro_batch, settings.pooling
        )
        self._unedited = self._source_read_once()
        self._deltas = {site: _zeros(pooled) for site, pooled in self._target.items()}
        self._biases = {site: _zeros(pooled) for site, pooled in self._target.items()}
        self._optimizer = make_optimizer(
            settings,
            list(self._map_parameters().values()),
            [] if gating is None else list(gating.parameters().values()),
        )
        self.steps_done = 0
        self.initial_loss = self.loss_over_all()

    @property
    def maps(self) -> dict[str, AffineMap]:
        """The maps as they are now: site -> float32, on the model's device."""
        return {
            site: AffineMap(
                weight=1 + delta.detach(),
                bias=self._biases[site].detach().clone(),
                gate=None if self._gating is None else self._gating.gate(site),
            )
            for site, delta in self._deltas.items()
        }

    @torch.no_grad()
    def loss_over_all(self) -> float:
        """Return the loss of all drawn sentences, scaled to the number of sentences in a step."""
        pooled = self._pooled_source()
        count = self._settings.sentences_in_a_step
        loss = float(distributional_loss(pooled, self._target)) * count / len(self._source)
        if self._gating is not None:
            loss += self._gating.loss_over_all(self._model, self._edits(), count, self._micro_batch)
        return loss

    def step(self) -> float:
        """Do one step of the optimizer and, if sparse, one proximal step; return the batch's loss.

        Raises:
            FitError: the loss is not finite. The maps are then as they were before.
        """
        settings = self._settings
        count = settings.sentences_in_a_step
        # Source and target are drawn independently: the loss compares distributions, not pairs.
        source_rows = torch.randperm(len(self._source), generator=self._random)[:count]
        target_rows = torch.randperm(settings.target_count, generator=self._random)[:count]
        learning_rate = settings.learning_rate_at(self.steps_done)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad()
        loss = self._backward(source_rows, target_rows)
        if self._gating is not None:
            loss += self._gating.backward(
                self._model, self._edits(), count, self._micro_batch, self._random
            )
        if not math.isfinite(loss):
            raise FitError(
                f"the loss is not finite at step {self.steps_done + 1}: lower the learning rate"
            )
        self._optimizer.step()
        if settings.gamma > 0:
            self._sparsify(learning_rate * settings.gamma)
        self.steps_done += 1
        return loss

    def state(self) -> State:
        """Return all that the fit needs to go on. The tensors are those that later steps change."""
        tensors = {
            _STEP: torch.tensor(self.steps_done),
            _RANDOM: self._random.get_state(),
        }
        parameters = self._parameters()
        tensors |= {name: parameter.detach() for name, parameter in parameters.items()}
        return tensors | optimizer_state(self._optimizer, parameters)

    def restore(self, state: State) -> None:
        """Go on from a state of a fit with the same sites and settings.

        Raises:
            FitError: the state is not one of such a fit. Nothing is then changed.
        """
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != self._state_shapes():
            raise FitError("the checkpoint is of a fit with other sites or another optimizer")
        steps_done = int(state[_STEP])
        if not 0 < steps_done <= self._settings.steps:
            raise FitError(
                f"the checkpoint is of step {steps_done}, the fit has {self._settings.steps}"
            )
        try:
            self._random.set_state(state[_RANDOM].cpu())
        except (RuntimeError, TypeError) as error:
            raise FitError("the checkpoint holds no state of a random number generator") from error
        parameters = self._parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
        restore_optimizer(self._optimizer, parameters, state, self._settings.optimizer)
        self.steps_done = steps_done

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        parameters = self._parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        shapes |= optimizer_shapes(parameters, self._settings.optimizer)
        return shapes | {_STEP: (), _RANDOM: tuple(self._random.get_state().shape)}

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name, in the optimizer's order."""
        gates = {} if self._gating is None else self._gating.parameters()
        return self._map_parameters() | gates

    def _map_parameters(self) -> dict[str, Tensor]:
        deltas = {f"delta.{site}": delta for site, delta in self._deltas.items()}
        return deltas | {f"bias.{site}": bias for site, bias in self._biases.items()}

    def _edits(self) -> dict[str, Callable[[Tensor], Tensor]]:
        if self._gating is not None:
            return {
                site: self._gating.edit(site, delta, self._biases[site])
                for site, delta in self._deltas.items()
            }
        return {
            site: partial(_apply, delta, self._biases[site]) for site, delta in self._deltas.items()
        }

    def _source_read_once(self) -> dict[str, Tensor] | None:
        """Return the source's pooled activations of the untouched model, if they decide all steps.

        A single site's activations depend on no map, and an affine map of the mean, or of the last
        token, is that of the mapped tokens. Steps then need no model: they take milliseconds.
        """
        if len(self._target) > 1 or self._gating is not None:
            return None
        if self._settings.pooling not in ("mean", "last"):
            return None
        return self._read_source(None)

    def _pooled_source(self) -> dict[str, Tensor]:
        """Return the pooled activations of the whole source, with all maps active."""
        if self._unedited is not None:
            return self._pooled(torch.arange(len(self._source)))
        return self._read_source(self._edits())

    def _read_source(self, edits: Edits | None) -> dict[str, Tensor]:
        """Return the pooled activations of the whole source, from passes through the model."""
        return collect_token_means(
            self._model,
            list(self._target),
            self._source,
            self._micro_batch,
            self._settings.pooling,
            edits,
        )

    def _pooled(self, rows: Tensor) -> dict[str, Tensor]:
        if self._unedited is not None:
            edits = self._edits()
            return {site: edits[site](every[rows]) for site, every in self._unedited.items()}
        batch = pad_right([self._source[row] for row in rows.tolist()], model_device(self._model))
        return site_token_means(
            self._model, list(self._target), batch, self._edits(), self._settings.pooling
        )

    def _backward(self, source_rows: Tensor, target_rows: Tensor) -> float:
        """Compute one batch's loss, and its gradients for all maps."""
        target = {site: every[target_rows] for site, every in self._target.items()}
        parts = torch.split(source_rows, self._micro_batch)
        if len(parts) == 1:
            loss = distributional_loss(self._pooled(source_rows), target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()
        # The loss sorts the whole batch, so it is no sum over parts. Its gradients at the pooled
        # activations, which are small, are computed first, and then carried through each part.
        with torch.no_grad():
            by_part = [self._pooled(rows) for rows in parts]
        whole = {
            site: torch.cat([pooled[site] for pooled in by_part]).requires_grad_()
            for site in target
        }
        loss = distributional_loss(whole, target)
        gradients = torch.autograd.grad(loss, list(whole.values()))
        by_part_gradients = zip(
            *(torch.split(each, self._micro_batch) for each in gradients), strict=True
        )
        for rows, upstream in zip(parts, by_part_gradients, strict=True):
            pooled = self._pooled(rows)
            torch.autograd.backward([pooled[site] for site in whole], upstream)
        return loss.item()

    @torch.no_grad()
    def _sparsify(self, tau: float) -> None:
        settings = self._settings
        for parameter in self._map_parameters().values():
            parameter.copy_(proximal_step(parameter, tau, settings.lambda_1, settings.lambda_group))


def _apply(delta: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    return z + torch.addcmul(bias, delta, z)


def _zeros(pooled: Tensor) -> Tensor:
    return torch.zeros_like(pooled[0]).requires_grad_()
