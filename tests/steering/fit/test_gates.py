"""Tests gates: the regression against scikit-learn, its folding, and how often they are right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from steering.affine import Gate, gate_of
from steering.fit import FitError
from steering.fit.activations import TokenIds, collect_token_means
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import split_texts
from steering.fit.gates import fit_gate, fit_gates, held_out_accuracy
from tests.tiny import SITES, WIDTH, tiny_model


def _clouds(source: int, control: int, width: int = 24, shift: float = 1.0) -> tuple[Tensor, ...]:
    """Return correlated activations around a mean far from 0; the source's are shifted."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(width, width, generator=generator)
    rows = torch.randn(source + control, width, generator=generator) @ mixing + 5
    rows[:source] += shift * torch.randn(width, generator=generator)
    return rows[:source], rows[source:]


def _opened(gate: Gate, rows: Tensor) -> Tensor:
    return gate_of(rows, gate.weight[None], gate.bias[None])[:, 0]


def _sentences(count: int, seed: int, low: int, high: int) -> list[TokenIds]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("source_rows", "control_rows", "width"), [(40, 40, 24), (15, 60, 24), (14, 16, 48)]
)
@pytest.mark.parametrize(("components", "l2"), [(1, 1.0), (5, 1.0), (12, 0.05), (24, 30.0)])
def test_a_gate_is_scikit_learns_regression_on_raw_activations(
    source_rows: int, control_rows: int, width: int, components: int, l2: float
) -> None:
    """The folded a and c give the pipeline's probabilities, also for activations never seen."""
    source, control = _clouds(source_rows, control_rows, width)
    gate = fit_gate(source, control, GateSettings(components=components, l2=l2), "here")
    pipeline = make_pipeline(
        PCA(components, svd_solver="full"),
        StandardScaler(),
        LogisticRegression(C=1 / l2, class_weight="balanced", tol=1e-10, max_iter=10_000),
    )
    rows = torch.cat([source, control]).double().numpy()
    pipeline.fit(rows, np.repeat([1, 0], [source_rows, control_rows]))
    unseen = torch.cat([source, control, *_clouds(9, 9, width, shift=3)])
    expected = torch.from_numpy(pipeline.predict_proba(unseen.double().numpy())[:, 1]).float()
    torch.testing.assert_close(_opened(gate, unseen), expected, atol=2e-5, rtol=0)
    assert expected.max() - expected.min() > 0.25
    assert gate.weight.dtype == gate.bias.dtype == torch.float32
    assert gate.weight.shape == (width,)
    assert gate.bias.shape == ()


def test_a_gate_lies_in_the_span_of_the_first_components() -> None:
    source, control = _clouds(30, 30)
    rows = torch.cat([source, control]).double()
    components = torch.from_numpy(PCA(3).fit(rows.numpy()).components_)
    gate = fit_gate(source, control, GateSettings(components=3), "here")
    inside = components.T @ (components @ gate.weight.double())
    torch.testing.assert_close(inside.float(), gate.weight, atol=1e-6, rtol=1e-4)


def test_separable_activations_have_a_finite_gate() -> None:
    """Without a penalty the weights would grow for ever."""
    source, control = _clouds(20, 20, shift=200)
    gate = fit_gate(source, control, GateSettings(l2=1e-6), "here")
    assert torch.isfinite(gate.weight).all()
    assert _opened(gate, source).min() > 0.99
    assert _opened(gate, control).max() < 0.01


def test_more_components_than_the_rank_are_left_out() -> None:
    """Tokens of one direction only: the other components would be noise of rounding."""
    along = torch.linspace(-1, 1, 20)[:, None] * torch.ones(8)
    gate = fit_gate(along[10:], along[:10], GateSettings(components=5), "here")
    one = fit_gate(along[10:], along[:10], GateSettings(components=1), "here")
    torch.testing.assert_close(gate.weight, one.weight)
    assert torch.equal(_opened(gate, along) > 0.5, torch.arange(20) >= 10)


def test_equal_activations_are_refused() -> None:
    with pytest.raises(FitError, match=r"all activations at model\.x are equal"):
        fit_gate(torch.ones(4, 3), torch.ones(5, 3), GateSettings(), "model.x")


def test_each_site_has_the_gate_of_its_own_untouched_means() -> None:
    model = tiny_model("llama")
    settings = GateSettings(components=3, seed=4)
    texts = split_texts(_sentences(20, 1, 1, 30), _sentences(20, 2, 30, 60), settings)
    gates = fit_gates(model, SITES, texts, settings)
    source = collect_token_means(model, SITES, texts.source, batch_size=1)
    control = collect_token_means(model, SITES, texts.control, batch_size=1)
    for site in SITES:
        alone = fit_gate(source[site], control[site], settings, site)
        torch.testing.assert_close(gates[site].weight, alone.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gates[site].bias, alone.bias, rtol=1e-3, atol=1e-4)
    again = fit_gates(model, SITES, texts, settings)
    assert all(torch.equal(gates[site].weight, again[site].weight) for site in SITES)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gate_of_last_tokens_is_fitted_and_judged_on_them() -> None:
    model = tiny_model("llama")
    settings = GateSettings(components=3, pooling="last")
    texts = split_texts(_sentences(40, 1, 1, 30), _sentences(40, 2, 30, 60), settings)
    gates = fit_gates(model, SITES, texts, settings)
    source = collect_token_means(model, SITES, texts.source, 1, "last")
    control = collect_token_means(model, SITES, texts.control, 1, "last")
    alone = fit_gate(source[SITES[0]], control[SITES[0]], settings, SITES[0])
    torch.testing.assert_close(gates[SITES[0]].weight, alone.weight, rtol=1e-3, atol=1e-4)
    # A gate that reads one coordinate is right as often as that coordinate tells the sides apart.
    threshold = Gate(torch.eye(WIDTH)[0] * 1e4, torch.tensor(0.0))
    right = [
        (collect_token_means(model, SITES[:1], side, 1, "last")[SITES[0]][:, 0] > 0).double()
        for side in (texts.held_out_source, texts.held_out_control)
    ]
    accuracy = held_out_accuracy(model, {SITES[0]: threshold}, texts, pooling="last")
    expected = (float(right[0].mean()) + 1 - float(right[1].mean())) / 2
    assert accuracy[SITES[0]] == pytest.approx(expected)


def test_sentences_that_differ_are_told_apart_and_others_are_not() -> None:
    model = tiny_model("llama")
    settings = GateSettings(components=16)
    apart = split_texts(_sentences(200, 1, 1, 30), _sentences(300, 2, 30, 60), settings)
    alike = split_texts(_sentences(200, 1, 1, 60), _sentences(300, 2, 1, 60), settings)
    accuracy = held_out_accuracy(model, fit_gates(model, SITES, apart, settings), apart)
    chance = held_out_accuracy(model, fit_gates(model, SITES, alike, settings), alike)
    assert set(accuracy) == set(chance) == set(SITES)
    assert min(accuracy.values()) > 0.85
    assert all(0.35 < value < 0.65 for value in chance.values())


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_a_gate_that_never_moves_has_an_accuracy_of_a_half(bias: float) -> None:
    settings = GateSettings(components=2)
    texts = split_texts(_sentences(10, 1, 1, 30), _sentences(40, 2, 30, 60), settings)
    gates = {SITES[0]: Gate(torch.zeros(WIDTH), torch.tensor(bias))}
    assert held_out_accuracy(tiny_model("llama"), gates, texts) == {SITES[0]: 0.5}


@pytest.mark.parametrize("held_out", [False, True])
def test_activations_that_are_not_finite_are_refused(held_out: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[77] = torch.nan
    settings = GateSettings(components=2)
    texts = split_texts(_sentences(8, 1, 1, 30), _sentences(8, 2, 30, 60), settings)
    nan: list[TokenIds] = [[77, 3]]
    broken = replace(texts, held_out_control=nan) if held_out else replace(texts, source=nan)
    with pytest.raises(FitError, match=f"activations at {SITES[0]} are not finite"):
        held_out_accuracy(model, fit_gates(model, SITES, broken, settings), broken)
