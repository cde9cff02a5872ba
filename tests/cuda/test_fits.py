"""Tests a LinEAS fit on a GPU: it repeats to the bit, goes on, and gives what a CPU gives."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from steering.fit.lineas import fit_lineas
from steering.fit.lineas_settings import LineasSettings
from steering.fit.pooling import Pooling
from steering.sites import input_site
from tests.cuda.devices import DEVICE, MARKS, LoadOnDevice
from tests.tiny import SITES, tiny_model

pytestmark = MARKS

ALL_SITES = (*SITES, input_site("model.layers.1.self_attn.o_proj"), "model.norm")
SOURCE = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [10]]
TARGET = [[20, 21], [22, 23, 24], [25], [26, 27, 28, 29, 30], [31, 32]]


class _LastState:
    """Keeps the state after one step."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._state: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self._state

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        if step == self._kept:
            self._state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}


@pytest.mark.parametrize("pooling", ["mean", "min", "max", "last"])
def test_a_fit_repeats_goes_on_and_is_the_cpus(
    load_on_device: LoadOnDevice, pooling: Pooling
) -> None:
    model = load_on_device("llama", "float32").model
    settings = LineasSettings(
        samples=4,
        target_samples=5,
        batch_size=4,
        micro_batch=3,
        steps=8,
        optimizer="adamw",
        learning_rate=0.01,
        gamma=0.001,
        pooling=pooling,
    )
    state = _LastState(5)
    maps, report = fit_lineas(model, ALL_SITES, SOURCE, TARGET, settings, checkpoint=state)
    rest, _ = fit_lineas(model, ALL_SITES, SOURCE, TARGET, settings, checkpoint=state)
    expected, cpu_report = fit_lineas(tiny_model("llama"), ALL_SITES, SOURCE, TARGET, settings)
    assert report.final_loss == pytest.approx(cpu_report.final_loss, rel=1e-2)
    for site, map_ in maps.items():
        assert map_.weight.device.type == DEVICE.type
        assert torch.equal(map_.weight, rest[site].weight)
        assert torch.equal(map_.bias, rest[site].bias)
        # Adam's first steps are as long for a gradient of rounding errors as for any other.
        weight, bias = map_.weight.cpu(), map_.bias.cpu()
        close = torch.isclose(weight, expected[site].weight, atol=1e-3)
        assert (close & torch.isclose(bias, expected[site].bias, atol=1e-3)).float().mean() > 0.9
