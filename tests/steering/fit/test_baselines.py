"""Tests of Lin-AcT, Mean-AcT and CAA against a slow reference that runs one sentence at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.activations import TokenIds
from steering.fit.baselines import (
    BaselineSettings,
    ClosedForm,
    MappedSides,
    fit_baseline,
)
from steering.fit.closed_forms import linear_transport, mean_shift
from steering.fit.pooling import Pooling
from steering.settings import AffineSettings
from tests.oracles import Oracle
from tests.tiny import SITES, family_sites, tiny_model

INPUTS = tuple(f"model.layers.{layer}.self_attn.o_proj.input" for layer in range(2))


def _sentences(count: int, seed: int, low: int = 1, high: int = 64) -> list[TokenIds]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=random).tolist()
    return [torch.randint(low, high, (n,), generator=random).tolist() for n in lengths]


SOURCE, TARGET = _sentences(7, 1, high=30), _sentences(5, 2, low=20)


def _activations(
    model: PreTrainedModel, site: str, tokens: TokenIds, maps: Mapping[str, AffineMap]
) -> Tensor:
    """Return what the oracle's model has at a site, (tokens, d), with maps at strength 1."""
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: Any, output: Any = None) -> None:
        given = args if output is None else output
        seen.append((given[0] if isinstance(given, tuple) else given).reshape(len(tokens), -1))

    module: nn.Module = model.get_submodule(site.removesuffix(".input"))
    hook = (
        module.register_forward_pre_hook(record)
        if site.endswith(".input")
        else module.register_forward_hook(record)
    )
    with hook:
        Oracle(model).logits(tokens, len(tokens), [(maps, AffineSettings(1.0))])
    (activations,) = seen
    return activations.float()


def _pooled(
    model: PreTrainedModel,
    site: str,
    sentences: Sequence[TokenIds],
    maps: Mapping[str, AffineMap],
    pooling: Pooling,
) -> Tensor:
    by_sentence = [_activations(model, site, sentence, maps) for sentence in sentences]
    pools: Mapping[Pooling, Callable[[Tensor], Tensor]] = {
        "mean": lambda z: z.mean(0),
        "min": lambda z: z.min(0).values,
        "max": lambda z: z.max(0).values,
        "last": lambda z: z[-1],
    }
    return torch.stack([pools[pooling](z) for z in by_sentence])


def _line(source: Tensor, target: Tensor) -> AffineMap:
    """Lin-AcT by numpy, with the whole range as its support."""
    x = np.sort(np.repeat(source.double().numpy(), len(target), axis=0), axis=0)
    y = np.sort(np.repeat(target.double().numpy(), len(source), axis=0), axis=0)
    lines = np.array([np.polyfit(x[:, j], y[:, j], 1) for j in range(x.shape[1])])
    weight, bias = torch.from_numpy(lines).float().T
    return AffineMap(weight, bias, low=source.min(0).values, high=source.max(0).values)


def _shift(source: Tensor, target: Tensor) -> AffineMap:
    return AffineMap(torch.ones(source.shape[1]), target.mean(0) - source.mean(0))


def _slow_fit(
    model: PreTrainedModel,
    sites_in_order: Sequence[str],
    closed_form: ClosedForm,
    pooling: Pooling,
    mapped: MappedSides,
) -> dict[str, AffineMap]:
    maps: dict[str, AffineMap] = {}
    for site in sites_in_order:
        x = _pooled(model, site, SOURCE, maps if mapped != "none" else {}, pooling)
        y = _pooled(model, site, TARGET, maps if mapped == "both" else {}, pooling)
        maps[site] = closed_form(x, y)
    return maps


def _assert_equal(maps: Mapping[str, AffineMap], expected: Mapping[str, AffineMap]) -> None:
    assert list(maps) == list(expected)
    for site, map_ in maps.items():
        for name in ("weight", "bias", "low", "high"):
            ours, theirs = getattr(map_, name), getattr(expected[site], name)
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


CLOSED_FORMS = {"lin-act": (linear_transport, _line), "mean-act": (mean_shift, _shift)}


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("mapped", ["source", "both", "none"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_maps_are_fitted_one_after_the_other(
    method: str, mapped: MappedSides, batch_size: int
) -> None:
    """In one pass where all sentences fit in a batch, and in one for each site where not."""
    model = tiny_model("llama")
    ours, slow = CLOSED_FORMS[method]
    sites = (INPUTS[0], SITES[0], "model.layers.0", INPUTS[1], SITES[1])
    settings = BaselineSettings(mapped_sides=mapped, batch_size=batch_size)
    maps, _ = fit_baseline(model, sorted(sites), SOURCE, TARGET, ours, settings)
    _assert_equal(maps, _slow_fit(model, sites, slow, "mean", mapped))


@pytest.mark.parametrize("pooling", ["last", "min", "max"])
def test_each_pooling_is_as_slow_code_pools(pooling: Pooling) -> None:
    model = tiny_model("llama")
    settings = BaselineSettings(pooling=pooling)
    maps, _ = fit_baseline(model, SITES, SOURCE, TARGET, mean_shift, settings)
    _assert_equal(maps, _slow_fit(model, SITES, _shift, pooling, "source"))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_sites_are_fitted_as_the_model_runs_them_and_not_by_name(batch_size: int) -> None:
    """OPT's `final_layer_norm` comes after `self_attn_layer_norm`."""
    model = tiny_model("opt")
    by_name = sorted(family_sites("opt"))
    running = [
        f"model.decoder.layers.{layer}.{norm}"
        for layer in range(2)
        for norm in ("self_attn_layer_norm", "final_layer_norm")
    ]
    assert by_name != running
    maps, _ = fit_baseline(
        model, by_name, SOURCE, TARGET, mean_shift, BaselineSettings(batch_size=batch_size)
    )
    _assert_equal(maps, _slow_fit(model, running, _shift, "mean", "source"))


def test_the_report_compares_the_distances_of_slow_code() -> None:
    model = tiny_model("llama")
    maps, report = fit_baseline(model, SITES, SOURCE, TARGET, linear_transport, BaselineSettings())

    def distance(active: Mapping[str, AffineMap]) -> float:
        by_site = []
        for site in SITES:
            earlier = {name: map_ for name, map_ in active.items() if name != site}
            before = [_activations(model, site, each, earlier) for each in SOURCE]
            mapped = [_served(active.get(site), z).mean(0) for z in before]
            x = torch.stack(mapped).repeat_interleave(len(TARGET), 0).sort(0).values
            y = _pooled(model, site, TARGET, {}, "mean").repeat_interleave(len(SOURCE), 0)
            by_site.append((x - y.sort(0).values).square().mean().item())
        return sum(by_site) / len(by_site)

    assert report.initial_distance == pytest.approx(distance({}), rel=1e-4)
    assert report.final_distance == pytest.approx(distance(maps), rel=1e-3)
    assert report.final_distance < report.initial_distance


def _served(map_: AffineMap | None, z: Tensor) -> Tensor:
    if map_ is None:
        return z
    edited = map_.weight * z + map_.bias
    if map_.low is None or map_.high is None:
        return edited
    return torch.where((z >= map_.low) & (z <= map_.high), edited, z)


def test_chained_shifts_close_every_gap_of_the_means() -> None:
    """Each site's shift makes up for what the earlier ones did; shifts of the untouched do not."""
    model, sites = tiny_model("llama"), ("model.layers.0", "model.layers.1")
    chained, _ = fit_baseline(model, sites, SOURCE, TARGET, mean_shift, BaselineSettings())
    at_once, _ = fit_baseline(
        model, sites, SOURCE, TARGET, mean_shift, BaselineSettings(mapped_sides="none")
    )
    wanted = _pooled(model, sites[1], TARGET, {}, "mean").mean(0)

    def reached(maps: Mapping[str, AffineMap]) -> Tensor:
        before = _pooled(model, sites[1], SOURCE, {sites[0]: maps[sites[0]]}, "mean")
        return before.mean(0) + maps[sites[1]].bias

    torch.testing.assert_close(reached(chained), wanted, atol=1e-4, rtol=1e-4)
    assert (reached(at_once) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_model_is_left_as_it_was_and_maps_are_float32(
    dtype: torch.dtype, batch_size: int
) -> None:
    model = tiny_model("llama").train()
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done: list[tuple[int, int]] = []
    maps, _ = fit_baseline(
        model,
        SITES,
        SOURCE,
        TARGET,
        linear_transport,
        BaselineSettings(batch_size=batch_size),
        lambda *each: done.append(each),
    )
    assert done == [(1, 2), (2, 2)]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for map_ in maps.values():
        for tensor in (map_.weight, map_.bias, map_.low, map_.high):
            assert tensor is not None
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad


def test_equal_files_give_no_edit() -> None:
    maps, report = fit_baseline(
        tiny_model("llama"), SITES, SOURCE, SOURCE, linear_transport, BaselineSettings()
    )
    for map_ in maps.values():
        torch.testing.assert_close(map_.weight, torch.ones_like(map_.weight))
        torch.testing.assert_close(map_.bias, torch.zeros_like(map_.bias), atol=1e-5, rtol=0)
    assert report.initial_distance == 0
    assert report.final_distance == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("sites", "source", "target", "message"),
    [
        (["model.layers.9.mlp"], SOURCE, TARGET, "no module"),
        (SITES, [], TARGET, "no sequence"),
        (SITES, SOURCE, [], "no sequence"),
        (SITES, [[1], []], TARGET, "no token"),
        (SITES, SOURCE[:1], TARGET, "at least 2 sentences"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    sites: list[str], source: list[TokenIds], target: list[TokenIds], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit_baseline(
            tiny_model("llama"), sites, source, target, linear_transport, BaselineSettings()
        )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"pooling": "median"}, "pooling"),
        ({"mapped_sides": "target"}, "mapped_sides"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(FitError, match=field):
        BaselineSettings(**settings)
