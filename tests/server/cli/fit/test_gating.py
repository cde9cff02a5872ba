"""Tests what gates put into a manifest, and which maps they leave out."""

import pytest
import torch

from server.cli.fit.gating import FittedGates, GatePlan
from server.cli.fit.output import FitCommandError
from server.cli.fit.training_files import TrainingFile
from steering.affine import AffineMap, Gate
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import GateTexts


def _fitted(accuracy: dict[str, float], least: float = 0.0) -> FittedGates:
    file = TrainingFile("neutral.txt", "0" * 64, ("a", "b"))
    gates = {site: Gate(torch.ones(2), torch.tensor(0.5)) for site in accuracy}
    plan = GatePlan("regression", file, GateSettings(), least)
    return FittedGates(plan, GateTexts([[1]], [[2]], [[3]], [[4]]), gates, accuracy)


def _maps(*sites: str) -> dict[str, AffineMap]:
    low, high = torch.zeros(2), torch.ones(2)
    return {site: AffineMap(torch.ones(2), torch.zeros(2), low, high) for site in sites}


def test_a_gated_map_keeps_its_other_parts() -> None:
    fitted, maps = _fitted({"a": 0.8, "b": 0.6}), _maps("a", "b")
    gated = fitted.put_on(maps)
    for site, map_ in gated.items():
        assert map_.gate is fitted.gates[site]
        assert map_.weight is maps[site].weight
        assert map_.low is maps[site].low
        assert map_.high is maps[site].high


def test_a_map_is_left_out_below_the_least_accuracy_only() -> None:
    assert set(_fitted({"a": 0.75, "b": 0.7499}, 0.75).put_on(_maps("a", "b"))) == {"a"}
    with pytest.raises(FitCommandError, match=r"no gate reaches it, the best is right about 0\.74"):
        _fitted({"a": 0.74, "b": 0.5}, 0.75).put_on(_maps("a", "b"))


def test_a_map_that_the_fit_has_left_out_needs_no_gate() -> None:
    """Sparsity may leave a site without a map."""
    assert set(_fitted({"a": 0.8, "b": 0.6}).put_on(_maps("b"))) == {"b"}


@pytest.mark.parametrize(("sites", "listed"), [(256, 256), (257, 0)])
def test_a_manifest_lists_so_many_sites(sites: int, listed: int) -> None:
    training = _fitted({f"site.{number}": 0.5 + number / 1000 for number in range(sites)}).training
    assert sum(key.startswith("gate_accuracy.") for key in training) == listed
    assert training["gate_accuracy_min"] == 0.5
    assert training["gate_accuracy"] == pytest.approx(0.5 + (sites - 1) / 2000, abs=1e-4)
