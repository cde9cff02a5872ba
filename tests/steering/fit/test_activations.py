"""Tests what a fit reads from a model: pooling, inputs and outputs, and edits while reading."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering.fit import FitError
from steering.fit.activations import (
    collect_token_means,
    pad_right,
    run_sites,
    site_token_means,
)
from steering.fit.pooling import Pooling, pool_tokens
from steering.sites import input_site
from tests.tiny import FAMILIES, WIDTH, tiny_model

SENTENCES = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11]]
CPU = torch.device("cpu")
O_PROJ = "model.layers.0.self_attn.o_proj"
MLP = "model.layers.1.mlp"

POOLED_BY_LOOPS: dict[Pooling, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
}


@pytest.mark.parametrize("pooling", POOLED_BY_LOOPS)
def test_a_sequence_is_pooled_over_its_own_tokens(pooling: Pooling) -> None:
    torch.manual_seed(0)
    z, lengths = torch.randn(4, 5, 3), [5, 2, 1, 3]
    # Padding that any mode would notice.
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    z = torch.where(mask[:, :, None], z, 1e6 * torch.randn(4, 5, 3))
    pooled = pool_tokens(z, mask.long(), pooling)
    assert pooled.dtype == torch.float32
    for row, length in enumerate(lengths):
        for neuron in range(3):
            expected = POOLED_BY_LOOPS[pooling](z[row, :length, neuron].tolist())
            assert pooled[row, neuron].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pooling", POOLED_BY_LOOPS)
def test_padding_gets_no_gradient(pooling: Pooling) -> None:
    z = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    pool_tokens(z, mask, pooling).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert torch.equal(z.grad[1, 1:], torch.zeros(2, 4))
    torch.testing.assert_close(z.grad.sum(1), torch.ones(2, 4))


def test_half_precision_is_pooled_in_float32() -> None:
    z = torch.full((1, 3, 2), 1.0078125, dtype=torch.bfloat16)
    for pooling in POOLED_BY_LOOPS:
        assert pool_tokens(z, torch.ones(1, 3).long(), pooling).dtype == torch.float32


def _seen(model: PreTrainedModel, module: str, sentence: list[int]) -> tuple[Tensor, Tensor]:
    """Return a module's input and output for one sentence, (tokens, d) each."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _module, args, output: seen.append((args[0], output))
    )
    model(input_ids=torch.tensor([sentence]))
    handle.remove()
    return seen[0][0].reshape(len(sentence), -1), seen[0][1].reshape(len(sentence), -1)


@pytest.mark.parametrize("pooling", POOLED_BY_LOOPS)
def test_inputs_and_outputs_are_read(pooling: Pooling) -> None:
    model = tiny_model("llama")
    sites = [input_site(O_PROJ), MLP, "model.norm"]
    read = collect_token_means(model, sites, SENTENCES, 3, pooling)
    for row, sentence in enumerate(SENTENCES):
        ones = torch.ones(1, len(sentence)).long()
        expected = (
            _seen(model, O_PROJ, sentence)[0],
            _seen(model, MLP, sentence)[1],
            _seen(model, "model.norm", sentence)[1],
        )
        for site, z in zip(sites, expected, strict=True):
            torch.testing.assert_close(
                read[site][row], pool_tokens(z[None], ones, pooling)[0], atol=1e-4, rtol=1e-4
            )


def test_sequences_of_like_length_share_a_pass() -> None:
    model = tiny_model("llama")
    shapes: list[tuple[int, ...]] = []
    done: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    sentences = [[1] * length for length in (2, 9, 3, 8, 2)]
    collect_token_means(
        model, [MLP], sentences, 2, on_batch=lambda read, total: done.append((read, total))
    )
    assert shapes == [(2, 9), (2, 3), (1, 2)]
    assert done == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_inputs_are_read_in_batches(family: str) -> None:
    """OPT flattens the batch in front of its `fc1`, and gives `fc1` (n * t, d)."""
    model = tiny_model(family)
    module = next(
        path
        for path, _ in model.named_modules()
        if path.endswith((".fc1", ".down_proj", ".mlp.c_proj"))
    )
    together = collect_token_means(model, [input_site(module)], SENTENCES, len(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        alone = _seen(model, module, sentence)[0].mean(0)
        torch.testing.assert_close(together[input_site(module)][row], alone, atol=1e-4, rtol=1e-4)


def test_an_edited_input_is_what_its_module_and_all_later_sites_see() -> None:
    model = tiny_model("llama")
    module = model.get_submodule(O_PROJ)
    assert isinstance(module, nn.Linear)
    sites = [input_site(O_PROJ), O_PROJ, "model.norm"]
    batch = pad_right([[1, 2, 3]], CPU)
    untouched = site_token_means(model, sites, batch)
    edited = site_token_means(model, sites, batch, {input_site(O_PROJ): lambda z: 2 * z + 1})
    torch.testing.assert_close(edited[sites[0]], 2 * untouched[sites[0]] + 1)
    torch.testing.assert_close(
        edited[O_PROJ], module(2 * untouched[sites[0]] + 1), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(edited["model.norm"], untouched["model.norm"], atol=1e-3)


def test_edits_are_active_while_any_number_of_sequences_are_read() -> None:
    model = tiny_model("llama")
    sites = [input_site(MLP), MLP]
    edits = {input_site(MLP): lambda z: z - 1}
    together = collect_token_means(model, sites, SENTENCES, 3, edits=edits)
    alone = [site_token_means(model, sites, pad_right([each], CPU), edits) for each in SENTENCES]
    untouched = collect_token_means(model, sites, SENTENCES, 3)
    for site in sites:
        expected = torch.cat([each[site] for each in alone])
        torch.testing.assert_close(together[site], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together[site], untouched[site], atol=1e-3)


def test_a_pass_ends_at_an_input_that_is_the_last_site() -> None:
    model = tiny_model("llama")
    ran: list[str] = []
    handle = model.get_submodule(MLP).register_forward_hook(lambda *_: ran.append(MLP))
    means = site_token_means(model, [input_site(MLP)], pad_right([[1, 2]], CPU))
    handle.remove()
    assert means[input_site(MLP)].shape == (1, WIDTH)
    assert ran == []


class _Dict(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"ids": input_ids}


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("inner", "the output of inner is a dict, not a tensor: choose another site"),
        ("other.input", "the model does not run other.input"),
        ("gone.input", "the model has no module gone"),
    ],
)
def test_a_site_that_cannot_be_read_is_refused(site: str, message: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = _Dict(), nn.Identity()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            return self.inner(input_ids, attention_mask)

    with pytest.raises(FitError, match=message):
        run_sites(Model(), pad_right([[1]], CPU), [site], lambda _site, z: z)


def test_no_sequences_are_refused() -> None:
    with pytest.raises(FitError, match="no sequence"):
        collect_token_means(tiny_model("llama"), [MLP], [], 2)
