"""Linear layers whose weights are laid out as oneDNN reads them, once instead of in every call.

Those that read the same input (queries, keys and values; gate and up) become one product, as small
ones are far from the memory's speed. On a CPU with bfloat16 instructions both together are worth
1.5 to 2 times the speed of a decode step's products (SmolLM2-135M, batch 1 to 32).

A single row is another matter: oneDNN reads its layout at half of the memory's speed or less, and a
loop over rows of weights as they were, which torch's compiler makes, nearly at all of it. So they
are kept beside the packed ones, where there is room for both.
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

# Of rows: oneDNN chooses a layout by it, which serves any other number as well.
_ROWS: Final = 32
# Of the memory that is free, for weights that are kept beside the packed ones.
_PLAIN_SHARE: Final = 0.25

OneRow: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`multiply_one_row`, compiled."""


class PackedLinear(nn.Module):
    """What an `nn.Linear` of a CPU computes, faster: (..., in) -> (..., out)."""

    packed: Tensor  # (out of all joined layers, in), the same in each of them
    plain: Tensor | None  # the same numbers, row by row; None where there is no room for both
    bias: Tensor | None  # (out of all joined layers,)

    def __init__(
        self,
        packed: Tensor,
        plain: Tensor | None,
        bias: Tensor | None,
        outputs: range,
        kept: "_LastProduct",
    ) -> None:
        """Its own `outputs` are some of the product's."""
        super().__init__()
        self.in_features = packed.shape[1]
        self.out_features = len(outputs)
        self.one_row: OneRow | None = None  # for who calls it uncompiled
        self._first = outputs.start
        self._kept = kept
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("plain", plain, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), bfloat16."""
        plain = self.plain if rows.numel() == self.in_features else None
        if torch.compiler.is_dynamo_compiling():  # equal calls of joined layers become one
            if plain is None:
                product = self.multiply(rows)
            else:
                product = multiply_one_row(rows, plain, self.bias)
        elif plain is not None and self.one_row is not None:
            product = self.one_row(rows, plain, self.bias)
        else:
            product = self._kept.of(rows, self.multiply)
        return product.narrow(-1, self._first, self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """By all joined layers' packed weights: (..., in_features) -> (..., out of all)."""
        product: Tensor = torch.ops.steerserve.packed_linear(rows, self.packed, self.bias)
        return product


def multiply_one_row(row: Tensor, plain: Tensor, bias: Tensor | None) -> Tensor:
    """A product that a compiler makes one loop of: (..., in) of one row -> (..., out).

    Not to be called uncompiled: it would fill memory with as many numbers as the weights have.
    """
    product = (plain.float() * row.float()[..., None, :]).sum(-1)
    return (product if bias is None else product + bias.float()).to(row.dtype)


class _LastProduct:
    """Of joined layers: what the first has computed, until the last has taken its part."""

    def __init__(self, takers: int) -> None:
        self._takers = takers
        self._left = 0
        self._rows: Tensor | None = None
        self._product: Tensor | None = None

    def of(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of these rows, multiplied if they are not those of the last call."""
        product = self._product
        if product is None or self._rows is not rows:
            product = multiply(rows)
            self._rows, self._product, self._left = rows, product, self._takers
        self._left -= 1
        if not self._left:
            self._rows = self._product = None
        return product


class OneProduct(CustomGraphPass):
    """In a compiled graph, makes one call of equal calls of `packed_linear`."""

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
        """What torch's cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))


def pack_linear_layers(model: PreTrainedModel, will_compile: bool = False) -> None:
    """Replace the linear layers of a model, where its processor gains by it.

    The weights themselves go, but for those that something else uses (tied embeddings), or that a
    compiler can make use of.
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
    plain = torch.cat(weights) if len(weights) > 1 else weights[0]  # which may be tied
    packed = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
    biases = [linear.bias.detach() for _, linear in group if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    kept = _LastProduct(len(group))
    first = 0
    for path, linear in group:
        outputs = range(first, first + linear.out_features)
        layer = PackedLinear(packed, plain if keep_plain else None, bias, outputs, kept)
        model.set_submodule(path, layer)
        first = outputs.stop


@torch.inference_mode()
def _with_equal_inputs(model: PreTrainedModel) -> list[list[tuple[str, nn.Linear]]]:
    """All linear layers, those side by side that a forward pass gives the same tensor."""
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    inputs: dict[str, list[Tensor]] = {path: [] for path in linears}

    def recorder(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _module, args, kwargs: inputs[path].append([*args, *kwargs.values()][0])

    with ExitStack() as hooks:
        for path, linear in linears.items():
            hook = linear.register_forward_pre_hook(recorder(path), with_kwargs=True)
            hooks.callback(hook.remove)
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    groups: dict[object, list[tuple[str, nn.Linear]]] = {}
    for path, linear in linears.items():
        # What does not run once in each pass stays alone.
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
    """The shape of the output, for the compiler."""
    return rows.new_empty((*rows.shape[:-1], packed.shape[0]))


# The compiler refuses `_linear_pointwise` with weights that are not constants, and one compiled
# layer serves all.
define_operator(
    "packed_linear(Tensor rows, Tensor packed, Tensor? bias) -> Tensor",
    _packed_linear,
    _packed_linear_fake,
    backends=("CPU", "MkldnnCPU"),
)
