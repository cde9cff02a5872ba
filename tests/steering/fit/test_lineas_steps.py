"""Tests single steps of a LinEAS fit: gradients, rates, the proximal step, and resumption."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.activations import TokenIds
from steering.fit.lineas import fit_lineas
from steering.fit.lineas_settings import LineasSettings, OptimizerName
from steering.fit.lineas_training import LineasTraining
from steering.fit.pooling import Pooling
from steering.sites import input_site
from tests.tiny import SITES, tiny_model

MORE_SITES = (*SITES, input_site("model.layers.1.self_attn.o_proj"), "model.norm")
SMALL = LineasSettings(samples=6, batch_size=4, steps=6, learning_rate=0.01, seed=3)


class _Table(nn.Module):
    """Looks up a token's row in a table, and passes it through one site."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.site = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.site(self.table[input_ids])
        return found


def _sentences(count: int, seed: int) -> list[TokenIds]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=random).tolist()
    return [torch.randint(1, 60, (length,), generator=random).tolist() for length in lengths]


def _training(settings: LineasSettings, sites: tuple[str, ...] = MORE_SITES) -> LineasTraining:
    random = torch.Generator().manual_seed(settings.seed)
    source, target = _sentences(settings.samples, 1), _sentences(settings.target_count, 2)
    return LineasTraining(tiny_model("llama"), sites, source, target, settings, random)


def _equal(one: Mapping[str, AffineMap], other: Mapping[str, AffineMap]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(map_.weight, other[site].weight) and torch.equal(map_.bias, other[site].bias)
        for site, map_ in one.items()
    )


def _soft(x: list[float], tau: float) -> list[float]:
    return [math.copysign(max(abs(value) - tau, 0.0), value) for value in x]


def _shrunk(x: list[float], tau: float) -> list[float]:
    norm = math.sqrt(sum(value * value for value in x))
    if norm == 0:
        return x
    return [max(1 - tau * math.sqrt(len(x)) / norm, 0.0) * value for value in x]


def test_a_step_is_algorithm_1_in_loops() -> None:
    """One SGD step from the identity, then soft thresholding and the group's, with rate * gamma."""
    torch.manual_seed(0)
    n, d, rate, gamma = 5, 4, 0.05, 3.0
    table = torch.randn(2 * n, d, dtype=torch.float64).float()
    settings = LineasSettings(
        samples=n, batch_size=n, learning_rate=rate, gamma=gamma, lambda_1=0.5, lambda_group=0.25
    )
    training = LineasTraining(
        _Table(table),
        ["site"],
        [[row] for row in range(n)],
        [[n + row] for row in range(n)],
        settings,
        torch.Generator().manual_seed(0),
    )
    loss = training.step()
    weight_steps, bias_steps, losses = [], [], []
    for neuron in range(d):
        z = sorted(table[:n, neuron].tolist())
        y = sorted(table[n:, neuron].tolist())
        losses.append(sum((a - b) ** 2 for a, b in zip(z, y, strict=True)))
        slope = [2 * (a - b) / d for a, b in zip(z, y, strict=True)]
        weight_steps.append(-rate * sum(s * a for s, a in zip(slope, z, strict=True)))
        bias_steps.append(-rate * sum(slope))
    assert loss == pytest.approx(sum(losses) / d, rel=1e-5)
    tau = rate * gamma
    deltas = _shrunk(_soft(weight_steps, tau * 0.5), tau * 0.25)
    biases = _shrunk(_soft(bias_steps, tau * 0.5), tau * 0.25)
    assert any(value == 0 for value in (*deltas, *biases))  # otherwise nothing was thresholded
    assert any(value != 0 for value in (*deltas, *biases))
    map_ = training.maps["site"]
    torch.testing.assert_close(map_.weight - 1, torch.tensor(deltas), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(map_.bias, torch.tensor(biases), atol=1e-6, rtol=1e-4)


def test_the_rates_are_those_of_torchs_cosine() -> None:
    settings = replace(SMALL, steps=9, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for step in range(9):
        assert settings.learning_rate_at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 99, 2**63])
def test_a_micro_batch_changes_the_memory_and_not_the_maps(micro_batch: int) -> None:
    whole, parts = _training(SMALL), _training(replace(SMALL, micro_batch=micro_batch))
    rows: list[int] = []
    handle = parts._model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for _ in range(3):
        assert parts.step() == pytest.approx(whole.step(), rel=1e-4)
    handle.remove()
    assert max(rows) <= micro_batch
    for site, map_ in whole.maps.items():
        torch.testing.assert_close(parts.maps[site].weight, map_.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parts.maps[site].bias, map_.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last", "min", "max"])
def test_a_single_site_is_read_once_and_its_maps_are_the_same(
    pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, pooling=pooling)
    once = _training(settings, ("model.norm",))
    passes: list[int] = []
    once._model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(LineasTraining, "_source_read_once", lambda _: None)
    always = _training(settings, ("model.norm",))
    assert once.initial_loss == pytest.approx(always.initial_loss, rel=1e-5)
    for _ in range(3):
        assert once.step() == pytest.approx(always.step(), rel=1e-4)
    # The smallest and largest values of mapped tokens are not those of the tokens, mapped.
    assert bool(passes) == (pooling in ("min", "max"))
    map_, same = once.maps["model.norm"], always.maps["model.norm"]
    torch.testing.assert_close(map_.weight, same.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(map_.bias, same.bias, atol=1e-5, rtol=1e-4)
    assert once.loss_over_all() == pytest.approx(always.loss_over_all(), rel=1e-4)


def test_sides_of_unequal_number_give_batches_of_equal_size() -> None:
    settings = replace(SMALL, samples=3, target_samples=11, batch_size=8, steps=4)
    assert settings.sentences_in_a_step == 3
    source, target = _sentences(20, 1), _sentences(30, 2)
    maps, report = fit_lineas(tiny_model("llama"), SITES, source, target, settings)
    assert set(maps) == set(SITES)
    assert report.final_loss < report.initial_loss


def test_weight_decay_pulls_towards_the_identity() -> None:
    free = replace(SMALL, optimizer="adamw", steps=40, weight_decay=0.0)
    maps = {}
    for decay in (0.0, 20.0):
        training = _training(replace(free, weight_decay=decay), SITES)
        for _ in range(free.steps):
            training.step()
        maps[decay] = training.maps
    for site in SITES:
        assert (maps[20.0][site].weight - 1).norm() < 0.7 * (maps[0.0][site].weight - 1).norm()
        assert maps[20.0][site].bias.norm() < 0.7 * maps[0.0][site].bias.norm()


def test_adamw_without_decay_is_adam() -> None:
    adam, adamw = (
        _training(replace(SMALL, optimizer="adam")),
        _training(replace(SMALL, optimizer="adamw", weight_decay=0.0)),
    )
    for _ in range(3):
        assert adam.step() == adamw.step()
    assert _equal(adam.maps, adamw.maps)


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
@pytest.mark.parametrize("kept", [1, 4, 6])
def test_a_fit_that_goes_on_ends_in_the_same_bits(optimizer: OptimizerName, kept: int) -> None:
    settings = replace(SMALL, optimizer=optimizer, gamma=0.01)
    model, source, target = tiny_model("llama"), _sentences(9, 1), _sentences(9, 2)
    memory = _Memory(kept)
    whole, whole_report = fit_lineas(model, MORE_SITES, source, target, settings, checkpoint=memory)
    steps: list[int] = []
    rest, rest_report = fit_lineas(
        model,
        MORE_SITES,
        source,
        target,
        settings,
        lambda step, _total, _loss: steps.append(step),
        memory,
    )
    assert steps == list(range(kept + 1, 7))
    assert _equal(whole, rest)
    assert whole_report == rest_report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.tensor(7)}, "is of step 7, the fit has 6"),
        ({"step": torch.tensor(0)}, "is of step 0"),
        ({"random": torch.zeros(5056, dtype=torch.int64)}, "random number generator"),
        ({"delta.model.norm": torch.zeros(3)}, "other sites or another optimizer"),
        ({"delta.lm_head": torch.zeros(3)}, "other sites or another optimizer"),
    ],
)
def test_a_state_that_is_not_the_fits_is_refused(change: dict[str, Tensor], message: str) -> None:
    training = _training(replace(SMALL, optimizer="adam"))
    training.step()
    state = {name: tensor.clone() for name, tensor in training.state().items()}
    other = _training(replace(SMALL, optimizer="adam"))
    with pytest.raises(FitError, match=message):
        other.restore({**state, **change})
    other.restore(state)
    assert other.step() == training.step()


def test_the_identity_is_left_out() -> None:
    """The second site's source and target are equal, so that its map has nothing to do."""

    class TwoSites(_Table):
        def __init__(self) -> None:
            super().__init__(torch.tensor([[1.0, 2.0], [5.0, 7.0]]))
            self.zero = nn.Identity()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found = super().forward(input_ids, attention_mask)
            zeros: Tensor = self.zero(0 * found)
            return zeros

    settings = LineasSettings(samples=1, steps=5)
    maps, report = fit_lineas(TwoSites(), ["site", "zero"], [[0]], [[1]], settings)
    assert set(maps) == {"site"}
    assert (report.support.sites_fitted, report.support.sites_kept) == (2, 1)
    assert (report.support.coordinates_fitted, report.support.coordinates_kept) == (4, 2)
    with pytest.raises(FitError, match="the source and the target do not differ"):
        fit_lineas(TwoSites(), ["site"], [[0]], [[0]], settings)
    sparse = replace(settings, gamma=1e6)
    with pytest.raises(FitError, match="lower gamma, which is 1e\\+06"):
        fit_lineas(TwoSites(), ["site"], [[0]], [[1]], sparse)
