import pytest
import torch
from transformers import AutoModelForCausalLM

from steering.bank import Bank
from steering.hooks import SteeringHooks, UnknownSiteError, measure_site_widths
from steering.route import Span, build_route
from steering.settings import AffineSettings, SlottedEdit
from tests.tiny import SITES, VOCABULARY, WIDTH, random_maps, tiny_config, tiny_model

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
    assert hooks.hooked_sites == set(SITES)
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
    assert "lm_head" not in widths
    assert "model.rotary_emb" not in widths


def test_site_widths_leave_no_hook_behind() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))  # type: ignore[no-untyped-call]
    measure_site_widths(model, VOCABULARY)
    assert not any(module._forward_hooks for module in model.modules())
