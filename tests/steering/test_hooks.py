"""Tests hooks, which edit a model at sites (outputs or inputs of modules), and site widths."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from steering.bank import Bank
from steering.hooks import SteeringHooks, UnknownSiteError
from steering.route import Span, build_route
from steering.settings import AffineSettings, SlottedEdit
from steering.site_widths import measure_site_widths
from tests import oracles
from tests.tiny import (
    SITES,
    VOCABULARY,
    WIDTH,
    head_outputs_width,
    random_maps,
    tiny_config,
    tiny_model,
)

CPU = torch.device("cpu")
TOKENS = torch.arange(5)[None]


def test_hooks_act_only_within_a_route() -> None:
    model = tiny_model("llama")
    hooks = SteeringHooks(model, model.lm_head)
    bank = Bank(1, CPU)
    bank.put(1, random_maps(1))
    edit = SlottedEdit(1, AffineSettings(1.0))
    route = build_route([Span(0, 5, 5, range(0), (edit,))], CPU)
    with torch.no_grad():
        before = model(TOKENS).logits
        for site in (*SITES, *SITES):  # installing twice edits once
            hooks.install(site)
        with hooks.routed(bank, route):
            inside = model(TOKENS).logits
        after = model(TOKENS).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, inside)


def test_an_unknown_site_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnknownSiteError, match=r"model\.layers\.9"):
        SteeringHooks(model, model.lm_head).install("model.layers.9")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_site_widths_are_those_of_the_modules_that_give_a_vector_a_token(family: str) -> None:
    widths = measure_site_widths(tiny_model(family), VOCABULARY)
    assert widths["model.layers.1.post_attention_layernorm"] == WIDTH
    assert widths["model.layers.0.mlp.gate_proj"] == 48
    assert widths["model.layers.0.self_attn"] == WIDTH
    assert widths["model.norm"] == WIDTH
    assert widths["model.layers.1.self_attn.o_proj.input"] == head_outputs_width(family)
    assert widths["model.layers.0.mlp.down_proj.input"] == 48
    assert widths["model.layers.0.self_attn.input"] == WIDTH  # passed as a keyword argument
    assert not {"lm_head", "lm_head.input", "model.embed_tokens.input"} & widths.keys()
    assert "model.rotary_emb" not in widths


def test_site_widths_leave_no_hook_behind() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))  # type: ignore[no-untyped-call]
    measure_site_widths(model, VOCABULARY)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_input_is_edited_whether_it_is_given_by_place_or_by_name() -> None:
    model = nn.Module()
    model.first, model.lm_head = nn.Identity(), nn.Identity()
    hooks = SteeringHooks(model, model.lm_head)
    bank = Bank(1, CPU)
    maps = random_maps(1, sites=("first.input",))
    bank.put(1, maps)
    hooks.install("first.input")
    route = build_route([Span(0, 2, 2, range(0), (SlottedEdit(1, AffineSettings(1.0)),))], CPU)
    z = torch.randn(1, 2, WIDTH)
    expected = torch.stack([oracles.affine(row, maps["first.input"], 1.0) for row in z[0]])
    with hooks.routed(bank, route):
        for edited in (model.first(z), model.first(input=z)):
            torch.testing.assert_close(edited[0], expected)


def test_ambiguous_input_paths_are_no_sites() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = nn.Linear(WIDTH, WIDTH)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.input(z)
            return output

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, WIDTH)
            self.block = Block()
            self.other = nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids: torch.Tensor, **_others: object) -> torch.Tensor:
            output: torch.Tensor = self.other(self.block(self.embed(input_ids)))
            return output

    widths = measure_site_widths(Model(), 4)
    assert widths.keys() == {"embed", "block", "block.input.input", "other", "other.input"}
