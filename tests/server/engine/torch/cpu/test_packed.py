"""Tests linear layers with packed weights, which are joined if they read the same input.

Weights are packed into oneDNN's layout, for processors with bfloat16 instructions.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from server.engine.torch.cpu import compiled_head, packed
from server.engine.torch.cpu.ahead import CompiledWronglyError
from server.engine.torch.cpu.compiled_head import compile_head
from server.engine.torch.cpu.packed import (
    MergeEqualProducts,
    PackedLinear,
    multiply_one_row,
    pack_linear_layers,
)
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16", False),
    reason="this processor computes bfloat16 in float32, and nothing is packed",
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def bfloat16(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    module: nn.Module = model
    module.to(torch.bfloat16)
    return model


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    modules: nn.Module = model
    return {path: each for path, each in modules.named_modules() if isinstance(each, PackedLinear)}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each product of a packed layer adds the number of its outputs."""
    counted: list[int] = []
    multiply = PackedLinear.multiply

    def counting(self: PackedLinear, rows: Tensor) -> Tensor:
        counted.append(len(self.packed))
        return multiply(self, rows)

    monkeypatch.setattr(PackedLinear, "multiply", counting)
    return counted


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt-350m", "gemma2", "phi3", "gpt2"])
def test_a_packed_model_computes_what_it_did(family: str) -> None:
    model = bfloat16(family)
    expected = model(input_ids=TOKENS).logits.float()
    pack_linear_layers(model)
    found = model(input_ids=TOKENS).logits.float()
    assert packed_layers(model)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@torch.inference_mode()
def test_layers_with_one_input_share_a_product(products: list[int]) -> None:
    model = bfloat16("llama")
    pack_linear_layers(model)
    layers = packed_layers(model)
    q, k, v, o = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo")
    gate, up = (layers[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert q.packed is k.packed is v.packed
    assert gate.packed is up.packed
    assert len({id(each.packed) for each in (q, gate, o, layers["lm_head"])}) == 4
    assert len(q.packed) == q.out_features + k.out_features + v.out_features
    model(input_ids=TOKENS)
    assert len(products) == 4 * model.config.num_hidden_layers + 1


@torch.inference_mode()
def test_outputs_are_of_the_rows_that_are_given() -> None:
    """A joined layer may be called with other rows than the last, or twice with the same."""
    model = bfloat16("qwen2")  # with biases
    attention = model.get_submodule("model.layers.0.self_attn")
    names = ("q_proj", "k_proj", "v_proj")
    plain = [attention.get_submodule(name) for name in names]
    pack_linear_layers(model)
    joined = [attention.get_submodule(name) for name in names]
    random = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    several = [
        torch.randn(1, tokens, width, generator=random).to(torch.bfloat16) for tokens in (1, 5, 5)
    ]
    for layer, rows in [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (2, 2), (0, 2), (1, 0), (0, 1)]:
        found = joined[layer](several[rows]).float()
        expected = plain[layer](several[rows]).float()
        assert torch.allclose(found, expected, atol=0.02, rtol=0.02), (layer, rows)


@torch.inference_mode()
def test_nothing_is_kept_after_the_last_has_taken_its_part() -> None:
    model = bfloat16("llama")
    pack_linear_layers(model)
    model(input_ids=TOKENS)
    for layer in packed_layers(model).values():
        assert layer._shared_product._rows is None
        assert layer._shared_product._product is None


@torch.inference_mode()
def test_a_compiled_graph_has_one_call_of_equal_ones() -> None:
    model = bfloat16("llama")
    mlp = model.get_submodule("model.layers.0.mlp")
    rows = torch.randn(1, 3, model.config.hidden_size).to(torch.bfloat16)
    pack_linear_layers(model)
    expected = mlp(rows).float()
    for one_product, calls in ((True, 2), (False, 3)):
        torch.compiler.reset()
        options = {"post_grad_custom_pre_pass": MergeEqualProducts()} if one_product else {}
        compiled = torch.compile(mlp, fullgraph=True, options={**options, "size_asserts": False})
        compiled(rows)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            found = compiled(rows).float()
        [multiplied] = [
            each for each in profiled.key_averages() if each.key == "mkldnn::_linear_pointwise"
        ]
        assert multiplied.count == calls
        assert torch.allclose(found, expected, atol=0.02, rtol=0.02)


def one_row_of(model: PreTrainedModel) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, model.config.hidden_size, generator=random).to(torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt-350m"])  # the latter two have biases
def test_a_single_row_is_multiplied_as_several_are(family: str) -> None:
    model = bfloat16(family)
    pack_linear_layers(model, will_compile=True)
    random = torch.Generator().manual_seed(0)
    for layer in packed_layers(model).values():
        row = torch.randn(1, layer.in_features, generator=random).to(torch.bfloat16)
        assert layer.plain is not None
        found = multiply_one_row(row, layer.plain, layer.bias)
        assert torch.allclose(found.float(), layer.multiply(row).float(), atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_a_compiled_single_row_takes_no_packed_weights() -> None:
    model = bfloat16("llama")
    mlp = model.get_submodule("model.layers.0.mlp")
    pack_linear_layers(model, will_compile=True)
    row = one_row_of(model)
    expected = mlp(row).float()
    compiled = torch.compile(mlp, fullgraph=True, options={"size_asserts": False})
    compiled(row)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        found = compiled(row).float()
    assert "mkldnn::_linear_pointwise" not in {each.key for each in profiled.key_averages()}
    assert torch.allclose(found, expected, atol=0.02, rtol=0.02)


def test_plain_weights_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for bytes_free, will_compile, kept in (
        (10**9, True, True),
        (10**5, True, False),
        (10**9, False, False),
    ):
        monkeypatch.setattr(packed, "free_memory", lambda _device, free=bytes_free: free)
        model = bfloat16("llama")
        pack_linear_layers(model, will_compile)
        assert {layer.plain is not None for layer in packed_layers(model).values()} == {kept}


def test_weights_that_are_tied_are_kept_without_a_copy() -> None:
    model = bfloat16("llama")
    embeddings = model.get_submodule("model.embed_tokens")
    model.get_submodule("lm_head").weight = next(embeddings.parameters())
    pack_linear_layers(model, will_compile=True)
    plain = packed_layers(model)["lm_head"].plain
    assert plain is not None
    assert plain.data_ptr() == next(embeddings.parameters()).data_ptr()


@torch.inference_mode()
def test_lm_head_multiplies_single_rows_compiled(products: list[int]) -> None:
    model = bfloat16("llama")
    pack_linear_layers(model, will_compile=True)
    head, row = packed_layers(model)["lm_head"], one_row_of(model)
    several = torch.cat([row, -row], dim=1)
    expected = head(several).float()
    # Reward edits are hooks of lm_head that act on the current step's rows, so compiling, which
    # runs on another thread, must not call them.
    hook = head.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    compile_head(head)
    hook.remove()
    products.clear()
    assert torch.allclose(head(row).float(), expected[:, :1], atol=0.02, rtol=0.02)
    assert not products
    assert torch.equal(head(several).float(), expected)  # still by the packed product
    assert len(products) == 1


@torch.inference_mode()
def test_a_wrong_loop_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bfloat16("llama")
    pack_linear_layers(model, will_compile=True)
    head = packed_layers(model)["lm_head"]
    monkeypatch.setattr(
        compiled_head,
        "multiply_one_row",
        lambda row, plain, bias: -multiply_one_row(row, plain, bias),
    )
    with pytest.raises(CompiledWronglyError):
        compile_head(head)
    assert head.one_row is None


def test_other_processors_keep_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    model = bfloat16("llama")
    pack_linear_layers(model)
    assert not packed_layers(model)


def test_other_dtypes_keep_their_layers() -> None:
    model = tiny_model("llama")
    pack_linear_layers(model)
    assert not packed_layers(model)
