"""Tests LinEAS fits: loss, recovery of a known map, use of maps while fitting, determinism."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.activations import (
    TokenIds,
    collect_token_means,
    pad_right,
    run_sites,
    site_token_means,
)
from steering.fit.lineas import fit_lineas
from steering.fit.lineas_settings import LineasSettings, OptimizerName
from tests.tiny import FAMILIES, SITES, WIDTH, family_sites, tiny_model


def _sentences(count: int, seed: int, low: int = 1, high: int = 64) -> list[TokenIds]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


class _Toy(nn.Module):
    """A model that looks up a token's row in a table, and passes it through two identity sites."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.first = nn.Identity()
        self.second = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first: Tensor = self.first(self.table[input_ids])
        second: Tensor = self.second(first)
        return second


def _shifted_toy() -> tuple[_Toy, list[TokenIds], list[TokenIds]]:
    """Return a model, and source and target sentences of one token: target = 1.5 * source - 2."""
    torch.manual_seed(1)
    source = torch.randn(32, 6)
    toy = _Toy(torch.cat([source, 1.5 * source - 2]))
    return toy, [[row] for row in range(32)], [[32 + row] for row in range(32)]


def test_an_affine_shift_is_recovered() -> None:
    toy, source, target = _shifted_toy()
    settings = LineasSettings(steps=300, optimizer="adam", learning_rate=0.05)
    maps, report = fit_lineas(toy, ["first"], source, target, settings)
    assert report.final_loss < report.initial_loss / 1000
    torch.testing.assert_close(maps["first"].weight, torch.full((6,), 1.5), atol=0.02, rtol=0)
    torch.testing.assert_close(maps["first"].bias, torch.full((6,), -2.0), atol=0.02, rtol=0)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.01), ("adam", 0.05)])
def test_the_loss_falls_with_sites_that_feed_each_other(
    optimizer: OptimizerName, rate: float
) -> None:
    toy, source, target = _shifted_toy()
    settings = LineasSettings(steps=200, optimizer=optimizer, learning_rate=rate)
    _, report = fit_lineas(toy, ["first", "second"], source, target, settings)
    assert report.final_loss < report.initial_loss / 10


def test_every_map_is_active_in_the_source_pass_and_seen_downstream() -> None:
    toy, source, _ = _shifted_toy()
    batch = pad_right(source[:4], torch.device("cpu"))
    untouched = site_token_means(toy, ["first", "second"], batch)
    edits = {"first": lambda z: 2 * z, "second": lambda z: z + 1}
    means = site_token_means(toy, ["first", "second"], batch, edits)
    torch.testing.assert_close(means["first"], 2 * untouched["first"])
    torch.testing.assert_close(means["second"], 2 * untouched["first"] + 1)


def test_a_mean_is_over_a_sentences_own_tokens() -> None:
    model = tiny_model("llama")
    sentences = _sentences(7, seed=2)
    together = collect_token_means(model, SITES, sentences, batch_size=7)
    alone = collect_token_means(model, SITES, sentences, batch_size=1)
    for site in SITES:
        assert together[site].shape == (7, WIDTH)
        torch.testing.assert_close(together[site], alone[site], atol=1e-5, rtol=1e-4)
    seen: list[Tensor] = []
    handle = model.get_submodule(SITES[1]).register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    model(input_ids=torch.tensor([sentences[3]]))
    handle.remove()
    torch.testing.assert_close(together[SITES[1]][3], seen[0][0].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_default_sites_are_read_and_edited_in_batches(family: str) -> None:
    """A padded batch gives the means of single sentences, in OPT too, which flattens its batch."""
    model, sites, sentences = tiny_model(family), family_sites(family), _sentences(4, 3)
    together = collect_token_means(model, sites, sentences, batch_size=4)
    for row, sentence in enumerate(sentences):
        alone = collect_token_means(model, sites, [sentence], batch_size=1)
        for site in sites:
            assert together[site].shape == (4, WIDTH)
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=1e-4, atol=1e-4)
    settings = LineasSettings(steps=2, samples=4)
    maps, _ = fit_lineas(model, sites, sentences, _sentences(4, 4), settings)
    assert set(maps) == set(sites)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[1, 2, 3]])
    logits = model.eval()(input_ids=ids).logits.detach()
    model.train()
    fit_lineas(model, SITES, _sentences(4, 0), _sentences(4, 1), LineasSettings(samples=4, steps=2))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model.eval()(input_ids=ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_of_a_real_architecture_is_float32_and_repeats(dtype: torch.dtype) -> None:
    model: nn.Module = tiny_model("llama")
    model.to(dtype)
    source, target = _sentences(12, 3, high=20), _sentences(12, 4, low=40)
    settings = LineasSettings(
        samples=8, batch_size=4, steps=20, optimizer="adam", learning_rate=0.02, seed=5
    )
    steps: list[tuple[int, int, float]] = []
    maps, report = fit_lineas(
        model, SITES, source, target, settings, lambda *step: steps.append(step)
    )
    again, _ = fit_lineas(model, SITES, source, target, settings)
    assert report.final_loss < 0.8 * report.initial_loss
    assert [step[:2] for step in steps] == [(number, 20) for number in range(1, 21)]
    assert all(math.isfinite(step[2]) for step in steps)
    for site, map_ in maps.items():
        assert isinstance(map_, AffineMap)
        assert map_.weight.dtype == map_.bias.dtype == torch.float32
        assert not map_.weight.requires_grad
        assert torch.equal(map_.weight, again[site].weight)
        assert torch.equal(map_.bias, again[site].bias)


def test_a_pass_ends_at_the_last_site() -> None:
    model = tiny_model("llama")
    ran: list[str] = []
    handle = model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    run_sites(model, pad_right([[1, 2]], torch.device("cpu")), SITES, lambda _site, z: z)
    handle.remove()
    assert ran == []


def test_a_tuple_is_edited_in_its_first_place() -> None:
    model = tiny_model("llama")
    widths: list[int] = []

    def edit(_site: str, z: Tensor) -> Tensor:
        widths.append(z.shape[-1])
        return z

    batch = pad_right([[1, 2, 3]], torch.device("cpu"))
    run_sites(model, batch, ["model.layers.0.self_attn", "model.layers.1.mlp"], edit)
    assert widths == [WIDTH, WIDTH]


@pytest.mark.parametrize(
    ("sites", "source", "message"),
    [
        (["model.layers.9.mlp"], [[1]] * 4, "no module"),
        (SITES, [[1]] * 3, "4 samples were asked for, the source has 3"),
        (SITES, [[1], [], [2], [3]], "no token"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    sites: list[str], source: list[TokenIds], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit_lineas(
            tiny_model("llama"), sites, source, [[1]] * 4, LineasSettings(samples=4, steps=1)
        )


@pytest.mark.parametrize(
    ("steps", "rate", "message"), [(60, 1e6, "is not finite"), (2, 1.0, "the loss rose")]
)
def test_a_loss_that_explodes_is_refused(steps: int, rate: float, message: str) -> None:
    toy, source, target = _shifted_toy()
    with pytest.raises(FitError, match=message):
        fit_lineas(toy, ["first"], source, target, LineasSettings(steps=steps, learning_rate=rate))


def test_activations_that_are_not_finite_are_refused_before_the_first_step() -> None:
    model = tiny_model("llama")
    torch.nn.init.constant_(model.get_submodule(SITES[0]).weight, torch.inf)  # type: ignore[arg-type]
    settings = LineasSettings(samples=4, steps=1)
    with pytest.raises(FitError, match="use a wider --dtype"):
        fit_lineas(model, [SITES[0]], [[1], [2], [3], [4]], [[5]] * 4, settings)


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 0), ("steps", 0), ("batch_size", -1), ("seed", -1)]
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(FitError, match=field):
        replace(LineasSettings(), **{field: value})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_is_positive_and_finite(rate: float) -> None:
    with pytest.raises(FitError, match="learning_rate"):
        LineasSettings(learning_rate=rate)
