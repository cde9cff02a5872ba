"""Linear layers whose weights are packed into oneDNN's layout once, instead of in every call.

Layers that read the same input (queries, keys and values; gate and up) are joined into one product,
because small products are far from using the memory's bandwidth. On a CPU with bfloat16
instructions, packing and joining together make a decode step's products 1.5 to 2 times as fast
(SmolLM2-135M, batch 1 to 32).

A single row is different: oneDNN reads the packed layout at half of the memory's bandwidth or less,
while a loop over the plain weights, made by torch's compiler, uses nearly all of it. So the plain
weights are kept beside the packed ones if there is room for both.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from transformers import PreTrainedModel

from server.engine.torch.model.devices import free_memory
from steering.kernels.operators import define_operator

# The number of rows for which oneDNN chooses the layout; any other number can use the layout too.
_ROWS: Final = 32
# Largest share of the free memory that plain weights may take beside the packed ones.
_PLAIN_SHARE: Final = 0.25

OneRow: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The type of `multiply_one_row`, compiled."""


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, faster on a CPU: (..., in) -> (..., out)."""

    packed: Tensor  # (out of all joined layers, in) in oneDNN's layout, shared by joined layers
    plain: Tensor | None  # the same weights, row by row; None if they are not kept
    bias: Tensor | None  # (out of all joined layers,)

    def __init__(
        self,
        packed: Tensor,
        plain: Tensor | None,
        bias: Tensor | None,
        outputs: range,
        shared: "_SharedProduct",
    ) -> None:
        """`outputs` is this layer's range of the joined outputs; they share `shared`."""
        super().__init__()
        self.in_features = packed.shape[1]
        self.out_features = len(outputs)
        self.one_row: OneRow | None = None  # multiplies single rows outside of compiled graphs
        self._first = outputs.start
        self._shared_product = shared
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("plain", plain, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Return this layer's outputs: (..., in_features) -> (..., out_features), bfloat16."""
        plain = self.plain if rows.numel() == self.in_features else None
        if torch.compiler.is_dynamo_compiling():
            # `MergeEqualProducts` merges the equal calls of joined layers.
            if plain is None:
                product = self.multiply(rows)
            else:
                product = multiply_one_row(rows, plain, self.bias)
        elif plain is not None and self.one_row is not None:
            product = self.one_row(rows, plain, self.bias)
        else:
            product = self._shared_product.get(rows, self.multiply)
        return product.narrow(-1, self._first, self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply by the joined packed weights: (..., in_features) -> (..., out of all layers)."""
        product: Tensor = torch.ops.steerserve.packed_linear(rows, self.packed, self.bias)
        return product


def multiply_one_row(row: Tensor, plain: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a single row by plain weights: (..., in) of one row -> (..., out).

    Only call it compiled, as one loop: uncompiled, it would store as many float32 products as there
    are weights.
    """
    product = (plain.float() * row.float()[..., None, :]).sum(-1)
    return (product if bias is None else product + bias.float()).to(row.dtype)


class _SharedProduct:
    """Caches the joined layers' product until each of them has taken its slice."""

    def __init__(self, consumers: int) -> None:
        self._consumers = consumers
        self._remaining = 0
        self._rows: Tensor | None = None
        self._product: Tensor | None = None

    def get(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the product of `rows`; it is computed unless it is cached for this very tensor."""
        product = self._product
        if product is None or self._rows is not rows:
            product = multiply(rows)
            self._rows, self._product, self._remaining = rows, product, self._consumers
        self._remaining -= 1
        if not self._remaining:
            self._rows = self._product = None
        return product


class MergeEqualProducts(CustomGraphPass):
    """Merges equal calls of `packed_linear` in a graph that is being compiled."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        first: dict[object, fx.Node] = {}
        for node in list(graph.nodes):
            if node.target is not torch.ops.steerserve.packed_linear.default:
                continue
            if (same := first.setdefault(node.args, node)) is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)

    def uuid(self) -> bytes:
        """Return what identifies this pass in torch's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def pack_linear_layers(model: PreTrainedModel, will_compile: bool = False) -> None:
    """Replace a model's linear layers by packed ones, if its processor is faster with them.

    The original weights are freed, except where something else uses them (tied embeddings) or where
    they are kept for compiled one-row products.
    """
    if not _is_worth_it(model):
        return
    groups = _with_equal_inputs(model)
    size = sum(linear.weight.nbytes for group in groups for _, linear in group)
    keep_plain = will_compile and size <= _PLAIN_SHARE * free_memory(model.device)
    for group in groups:
        _join(model, group, keep_plain)


def _join(model: PreTrainedModel, group: Sequence[tuple[str, nn.Linear]], keep_plain: bool) -> None:
    weights = [linear.weight.detach() for _, linear in group]
    # A single weight is not copied: it may be tied to the embeddings.
    plain = torch.cat(weights) if len(weights) > 1 else weights[0]
    packed = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
    biases = [linear.bias.detach() for _, linear in group if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    shared = _SharedProduct(len(group))
    first = 0
    for path, linear in group:
        outputs = range(first, first + linear.out_features)
        layer = PackedLinear(packed, plain if keep_plain else None, bias, outputs, shared)
        model.set_submodule(path, layer)
        first = outputs.stop


@torch.inference_mode()
def _with_equal_inputs(model: PreTrainedModel) -> list[list[tuple[str, nn.Linear]]]:
    """Return all linear layers, grouped by the input tensor that a forward pass gives them."""
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    inputs: dict[str, list[Tensor]] = {path: [] for path in linears}

    def recorder(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _module, args, kwargs: inputs[path].append([*args, *kwargs.values()][0])

    with ExitStack() as hooks:
        for path, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(recorder(path), with_kwargs=True))
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    groups: dict[object, list[tuple[str, nn.Linear]]] = {}
    for path, linear in linears.items():
        # A layer that does not run exactly once in a forward pass stays alone.
        alone = len(inputs[path]) != 1
        key = path if alone else (id(inputs[path][0]), linear.weight.dtype, linear.bias is None)
        groups.setdefault(key, []).append((path, linear))
    return list(groups.values())


def _is_worth_it(model: PreTrainedModel) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return (
        model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    )


def _packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output


def _packed_linear_fake(rows: Tensor, packed: Tensor, _bias: Tensor | None) -> Tensor:
    """Return an empty tensor of the output's shape, for the compiler."""
    return rows.new_empty((*rows.shape[:-1], packed.shape[0]))


# This operator hides `_linear_pointwise` from the compiler, which accepts it only with constant
# weights: in a graph that serves all layers, weights are inputs.
define_operator(
    "packed_linear(Tensor rows, Tensor packed, Tensor? bias) -> Tensor",
    _packed_linear,
    _packed_linear_fake,
    backends=("CPU", "MkldnnCPU"),
)
