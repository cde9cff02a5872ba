"""Writes files in the layouts of other projects, and edits activations as those projects do."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.tiny import WIDTH

State = dict[str, Any]
_QUANTILES = {"q_0_100": (0.0, 1.0), "q_5_95": (0.05, 0.95), "q_40_60": (0.4, 0.6)}


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_hooks(folder: Path, states: Mapping[str, State]) -> Path:
    """Write a folder of ml-act or ml-lineas: a state dictionary for each module."""
    folder.mkdir(exist_ok=True, parents=True)
    for module, state in states.items():
        torch.save(state, folder / f"{module}.statedict")
    return folder


def _quantiles(seed: int, width: int) -> dict[str, list[Tensor]]:
    responses = random_tensor(seed, 40, width)
    return {
        name: [torch.quantile(responses, q, dim=0) for q in ends]
        for name, ends in _QUANTILES.items()
    }


def linear_state(seed: int, width: int = WIDTH, quantiles: str = "q_all") -> State:
    """Return what ml-act's LinearOTHook saves after its fit."""
    table = _quantiles(seed, width)
    ends = [end.view(1, -1) for end in table[quantiles]] if quantiles != "q_all" else [-1e6, 1e6]
    return {
        "net.w1": 1 + 0.5 * random_tensor(seed + 1, 1, width),
        "net.b1": 0.5 * random_tensor(seed + 2, 1, width),
        "quantiles_dict_src": table,
        "quantiles_src": ends,
    }


def gaussian_state(seed: int, width: int = WIDTH, quantiles: str = "q_all") -> State:
    """Return what GaussianOTHook and OnlyMeanHook save; two of the coordinates hardly vary."""
    table = _quantiles(seed, width)
    deviations = 0.5 + random_tensor(seed + 3, 2, width).abs()
    deviations[0, 1] = deviations[1, 2] = 5e-5
    mask = (deviations > 1e-4).all(dim=0)
    ends = (
        [end[mask].view(1, -1) for end in table[quantiles]] if quantiles != "q_all" else [-1e6, 1e6]
    )
    return {
        "mu1": random_tensor(seed + 1, width),
        "mu2": random_tensor(seed + 2, width),
        "std1": deviations[0],
        "std2": deviations[1],
        "quantiles_dict_src": table,
        "quantiles_src": ends,
    }


def transported(state: State, z: Tensor, strength: float, quantiles: str, mean: bool) -> Tensor:
    """Return (n, d) activations as the hooks of ml-act edit them."""
    if "net.w1" in state:
        moved = z * state["net.w1"] + state["net.b1"]
        inside = torch.ones_like(z, dtype=torch.bool)
    else:
        ratio = torch.ones(()) if mean else state["std2"] / state["std1"]
        moved = ratio * (z - state["mu1"]) + state["mu2"]
        inside = ((state["std1"] > 1e-4) & (state["std2"] > 1e-4)).expand_as(z)
    low, high = state["quantiles_dict_src"].get(quantiles, (-1e6, 1e6))
    inside = inside & (low < z) & (z < high)
    return torch.where(inside, strength * moved + (1 - strength) * z, z)


def argre_head(seed: int, width: int = WIDTH, units: int = 24) -> nn.Sequential:
    """Return a random reward model as ARGRE's code builds it."""
    model = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 1))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(random_tensor(seed + number, *weight.shape) / weight.shape[-1] ** 0.5)
    return model


def write_argre(
    folder: Path, head: nn.Module, pairs: int = 11, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a head, a direction, and the hidden states of some pairs with their mask."""
    folder.mkdir(exist_ok=True, parents=True)
    width: int = head.state_dict()["0.weight"].shape[1]
    torch.save(head.state_dict(), folder / "best_score_model.pth")
    torch.save(0.3 * random_tensor(7, 1, 1, width), folder / "direction.pt")
    mask = (random_tensor(9, pairs, 2, 6) > -0.5).long()
    mask[:, :, 0] = 1
    states = random_tensor(8, pairs, 2, 6, width).to(dtype)
    states[mask == 0] = torch.inf  # must not be read
    torch.save(states, folder / "train_hidden_states.pt")
    torch.save(mask, folder / "train_attention_mask.pt")
    return folder


def refined_by_argre(
    head: nn.Sequential, direction: Tensor, positive: float, row: Tensor, eta: float, steps: int
) -> Tensor:
    """Return one (1, d) hidden state as ARGRE's inference edits it, with torch's optimizer."""
    with torch.no_grad():
        gap = positive - head(row)
        row = row + direction * gap * (gap > 0).float()
    point = row.clone().requires_grad_()
    optimizer = torch.optim.SGD([point], lr=eta)
    for _ in range(steps):
        optimizer.zero_grad()
        (-head(point).mean()).backward()
        optimizer.step()
    return point.detach()


def write_control_vector(
    path: Path,
    directions: Mapping[int, Tensor],
    architecture: str = "controlvector",
    lists: bool = False,
) -> Path:
    """Write a control vector as repeng's `export_gguf` does, and llama.cpp with the same names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    if lists:
        writer.add_array("some.numbers", [1, 2, 3])
        writer.add_array("some.words", ["a", "bc"])
        writer.add_bool("some.flag", True)
    for layer, vector in directions.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_svec(path: Path, directions: Mapping[int, Tensor]) -> Path:
    """Write a steering vector as IBM's `SteeringVector.save` does."""
    fields = {
        "model_type": "llama",
        "directions": {layer: vector.tolist() for layer, vector in directions.items()},
        "explained_variances": dict.fromkeys(directions, 0.5),
    }
    path.write_text(json.dumps(fields))
    return path


def write_sae_lens(folder: Path, decoder: Tensor, config: Mapping[str, object]) -> Path:
    """Write a sparse autoencoder as SAELens does, without the parts that are not read."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = {"W_dec": decoder, "W_enc": decoder.mT.contiguous(), "b_dec": decoder[0].clone()}
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": decoder.shape[1], **config}))
    return folder


def write_gemma_scope(path: Path, decoder: Tensor, compressed: bool = False) -> Path:
    """Write a sparse autoencoder as Gemma Scope's `params.npz`."""
    save = np.savez_compressed if compressed else np.savez
    save(path, W_dec=decoder.numpy(), W_enc=decoder.T.numpy(), b_dec=decoder[0].numpy())
    return path


def add_after(vector: Tensor) -> Callable[[nn.Module, object, object], object]:
    """Return a hook that adds to a layer's output, as repeng's ControlModule does."""

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        assert isinstance(output, Tensor)
        return output + vector

    return hook


def add_before(vector: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that adds to a layer's input, as IBM's LeashLayer does."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + vector, *args[1:])

    return hook


def hooked_logits(
    model: nn.Module, hooks: Sequence[tuple[str, str, Any]], tokens: Sequence[int]
) -> Tensor:
    """Return a model's logits, (tokens, vocabulary), under hooks (module, "before" or "after")."""
    handles = [
        model.get_submodule(path).register_forward_hook(hook)
        if when == "after"
        else model.get_submodule(path).register_forward_pre_hook(hook)
        for path, when, hook in hooks
    ]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits
