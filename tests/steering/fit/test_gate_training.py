"""Tests gates that are learnt with their maps: the served arithmetic, the loss, and its steps."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steering.affine import AffineMap, Gate, edit_tokens, gate_of
from steering.fit import FitError
from steering.fit.activations import TokenIds, collect_token_means, pad_right, site_token_means
from steering.fit.gate_training import GateTraining, control_loss, gated_edit
from steering.fit.lineas import fit_lineas
from steering.fit.lineas_settings import LineasSettings, OptimizerName
from steering.fit.lineas_training import LineasTraining
from steering.fit.wasserstein import distributional_loss
from tests import oracles
from tests.affine_batches import table_of
from tests.tiny import SITES, WIDTH, random_maps, tiny_model

SMALL = LineasSettings(samples=6, batch_size=4, steps=6, learning_rate=0.01, seed=3)


class _Table(nn.Module):
    """Looks up a token's row in a table, and passes it through two sites."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.first = nn.Identity()
        self.second = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first: Tensor = self.first(self.table[input_ids])
        second: Tensor = self.second(first)
        return second


def _sentences(count: int, seed: int, low: int = 1, high: int = 60) -> list[TokenIds]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=random).tolist()
    return [torch.randint(low, high, (length,), generator=random).tolist() for length in lengths]


def _gates(seed: int = 5, width: int = WIDTH, sites: tuple[str, ...] = SITES) -> dict[str, Gate]:
    random = torch.Generator().manual_seed(seed)
    return {
        site: Gate(0.3 * torch.randn(width, generator=random), torch.tensor(0.1)) for site in sites
    }


def _gating(weight: float = 1.0, control: int = 9) -> GateTraining:
    return GateTraining(_gates(), _sentences(control, 8), weight)


def _training(settings: LineasSettings, gating: GateTraining) -> LineasTraining:
    random = torch.Generator().manual_seed(settings.seed)
    source, target = _sentences(settings.samples, 1), _sentences(settings.samples, 2)
    return LineasTraining(tiny_model("llama"), SITES, source, target, settings, random, gating)


def _served(map_: AffineMap, z: Tensor) -> Tensor:
    """Return what the engine's edit at strength 1 makes of tokens: (..., d) float32."""
    tokens = z.reshape(-1, z.shape[-1])
    slots = torch.ones(len(tokens), dtype=torch.int64)
    table = table_of({1: map_}, torch.device("cpu"))
    return edit_tokens(tokens, slots, torch.ones(len(tokens)), table).view_as(z)


def _tensors(maps: Mapping[str, AffineMap]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for map_ in maps.values():
        assert map_.gate is not None
        tensors += [map_.weight, map_.bias, map_.gate.weight, map_.gate.bias]
    return tensors


@pytest.mark.parametrize("seed", range(5))
def test_the_edit_of_the_fit_is_the_served_edit_to_the_bit(seed: int) -> None:
    map_ = random_maps(seed, sites=("site",), gate=True)["site"]
    assert map_.gate is not None
    z = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(seed))
    edited = gated_edit(map_.weight - 1, map_.bias, map_.gate, z)
    assert torch.equal(edited, _served(map_, z))
    slow = torch.stack([oracles.affine(row, map_, 1.0) for row in z[0]])
    torch.testing.assert_close(edited[0], slow, rtol=1e-5, atol=1e-5)


def test_the_gradients_of_the_edit_are_those_of_differences() -> None:
    torch.manual_seed(1)
    delta, bias, weight = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in "abc")
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def edit(delta: Tensor, bias: Tensor, weight: Tensor, c: Tensor, z: Tensor) -> Tensor:
        return gated_edit(delta, bias, Gate(weight, c), z)

    assert torch.autograd.gradcheck(edit, (delta, bias, weight, c, z))


def test_maps_and_gates_edit_the_model_in_the_fit_as_when_served() -> None:
    training = _training(SMALL, _gating())
    for _ in range(3):
        training.step()
    batch = pad_right(_sentences(5, 11), torch.device("cpu"))
    fitted = site_token_means(training._model, SITES, batch, training._edits())
    served = {site: lambda z, map_=map_: _served(map_, z) for site, map_ in training.maps.items()}
    for site, means in site_token_means(training._model, SITES, batch, served).items():
        torch.testing.assert_close(fitted[site], means, rtol=1e-5, atol=1e-5)


def test_the_control_loss_is_what_loops_compute() -> None:
    """Sentences of unequal length, and a second site that sees what the first one changed."""
    torch.manual_seed(0)
    table = torch.randn(9, 4)
    maps = random_maps(3, width=4, sites=("first", "second"), gate=True)
    sentences = [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    edits = {site: lambda z, map_=map_: _served(map_, z) for site, map_ in maps.items()}
    loss = control_loss(_Table(table), pad_right(sentences, torch.device("cpu")), edits)
    by_site = {"first": 0.0, "second": 0.0}
    for sentence in sentences:
        for token in sentence:
            first = oracles.affine(table[token], maps["first"], 1.0)
            second = oracles.affine(first, maps["second"], 1.0)
            for site, edited in (("first", first), ("second", second)):
                change = sum((a - b) ** 2 for a, b in zip(edited, table[token], strict=True))
                by_site[site] += float(change) / len(sentence) / 4
    assert loss.item() == pytest.approx(sum(by_site.values()) / 2, rel=1e-4)


def test_a_step_descends_both_terms_by_autograd() -> None:
    """One SGD step of w, b, a and c, against a loss that is written down here."""
    torch.manual_seed(0)
    n, d, rate, weight = 4, 3, 0.02, 2.5
    table = torch.randn(3 * n, d)
    source, target, control = ([[start + row] for row in range(n)] for start in (0, n, 2 * n))
    start = _gates(2, d, ("first",))
    settings = LineasSettings(samples=n, batch_size=n, learning_rate=rate)
    gating = GateTraining(start, control, weight)
    random = torch.Generator().manual_seed(0)
    training = LineasTraining(_Table(table), ["first"], source, target, settings, random, gating)
    # From the identity a gate has no gradient yet; the second step has one.
    training.step()
    before = _tensors(training.maps)
    w, b, a, c = (tensor.clone().requires_grad_() for tensor in before)

    def edited(z: Tensor) -> Tensor:
        return z + torch.sigmoid(z @ a + c)[:, None] * ((w - 1) * z + b)

    moved = {"first": edited(table[:n])}
    changed = (edited(table[2 * n :]) - table[2 * n :]).square().sum(dim=0).mean()
    loss = distributional_loss(moved, {"first": table[n : 2 * n]}) + weight * changed
    gradients = torch.autograd.grad(loss, [w, b, a, c])
    second_rate = settings.learning_rate_at(1)
    assert training.step() == pytest.approx(loss.item(), rel=1e-5)
    for now, then, gradient in zip(_tensors(training.maps), before, gradients, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(now, then - second_rate * gradient, atol=1e-6, rtol=1e-4)
    # The gates that were given are not the ones that are learnt.
    assert torch.equal(start["first"].weight, _gates(2, d, ("first",))["first"].weight)


def test_gates_close_on_the_control_while_the_source_moves() -> None:
    """Control and source point to opposite sides of one coordinate, which the gate has to find."""
    torch.manual_seed(4)
    rows = torch.randn(96, 6)
    rows[:32, 0], rows[32:64, 0], rows[64:, 0] = 2.0, 2.0, -2.0
    rows[32:64, 1:] += 3
    table = _Table(rows)
    source, target, control = ([[start + row] for row in range(32)] for start in (0, 32, 64))
    settings = LineasSettings(steps=300, optimizer="adam", learning_rate=0.03)
    neutral = {"first": Gate(torch.zeros(6), torch.tensor(0.0))}
    gating = GateTraining(neutral, control, 1.0)
    gated, report = fit_lineas(table, ["first"], source, target, settings, gating=gating)
    plain, _ = fit_lineas(table, ["first"], source, target, settings)
    assert report.final_loss < report.initial_loss / 10
    change = {
        name: (_served(maps["first"], rows[64:]) - rows[64:]).norm().item()
        for name, maps in (("gated", gated), ("plain", plain))
    }
    assert change["gated"] < 0.1 * change["plain"]
    gate = gated["first"].gate
    assert gate is not None
    opened = gate_of(rows, gate.weight[None], gate.bias[None])[:, 0]
    assert opened[:32].min() > 0.5 > opened[64:].max()
    assert not gate.weight.requires_grad
    assert collect_token_means(table, ["first"], [[0]], 1)["first"].shape == (1, 6)


@pytest.mark.parametrize("micro_batch", [1, 3, 99])
def test_a_micro_batch_changes_the_memory_and_not_the_gates(micro_batch: int) -> None:
    whole = _training(SMALL, _gating())
    parts = _training(replace(SMALL, micro_batch=micro_batch), _gating())
    rows: list[int] = []
    handle = parts._model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for _ in range(3):
        assert parts.step() == pytest.approx(whole.step(), rel=1e-4)
    assert parts.loss_over_all() == pytest.approx(whole.loss_over_all(), rel=1e-4)
    handle.remove()
    assert max(rows) <= micro_batch
    for one, other in zip(_tensors(parts.maps), _tensors(whole.maps), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_control_smaller_than_a_batch_counts_as_much() -> None:
    """Its term is scaled to the batch's size, as the source's is summed over the batch."""
    training, sentence = _training(SMALL, _gating(control=9)), _sentences(1, 8)
    model, random = training._model, torch.Generator()
    maps = random_maps(3, gate=True)
    edits = {site: lambda z, map_=map_: _served(map_, z) for site, map_ in maps.items()}
    with torch.no_grad():
        one = control_loss(model, pad_right(sentence, torch.device("cpu")), edits).item()
    few = GateTraining(_gates(), sentence, 3.0)
    few_edits = {site: few.edit(site, map_.weight - 1, map_.bias) for site, map_ in maps.items()}
    with torch.no_grad():
        expected = control_loss(model, pad_right(sentence, torch.device("cpu")), few_edits).item()
    assert few.loss_over_all(model, edits, 4, 2) == pytest.approx(12 * one, rel=1e-5)
    assert few.backward(model, few_edits, 4, 2, random) == pytest.approx(12 * expected, rel=1e-5)


def test_sparsity_and_decay_are_of_the_maps_alone() -> None:
    settings = replace(SMALL, optimizer="adamw", weight_decay=1e6, gamma=1e6)
    training = _training(settings, _gating())
    training.step()
    for site, map_ in training.maps.items():
        assert torch.equal(map_.weight, torch.ones(WIDTH))
        assert torch.equal(map_.bias, torch.zeros(WIDTH))
        assert map_.gate is not None
        assert torch.equal(map_.gate.weight, _gates()[site].weight)


class _Memory:
    """Keeps the state after one step, and loads it in later fits."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._state: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self._state

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        if step == self._kept:
            self._state = {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_fit_of_gates_that_goes_on_ends_in_the_same_bits(optimizer: OptimizerName) -> None:
    settings = replace(SMALL, optimizer=optimizer)
    model, source, target, memory = (
        tiny_model("llama"),
        _sentences(9, 1),
        _sentences(9, 2),
        _Memory(4),
    )
    ends = [
        fit_lineas(model, SITES, source, target, settings, checkpoint=memory, gating=_gating())
        for _ in range(2)
    ]
    assert ends[0][1] == ends[1][1]
    for one, other in zip(_tensors(ends[0][0]), _tensors(ends[1][0]), strict=True):
        assert torch.equal(one, other)
    moved = ends[0][0][SITES[0]].gate
    assert moved is not None
    assert not torch.equal(moved.weight, _gates()[SITES[0]].weight)
    with pytest.raises(FitError, match="other sites or another optimizer"):
        fit_lineas(model, SITES, source, target, settings, checkpoint=memory)


def test_what_cannot_be_learnt_is_refused() -> None:
    with pytest.raises(FitError, match="the control has no sentence"):
        _gating(control=0)
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FitError, match="control_weight must be a positive number"):
            _gating(weight)
