"""Slow, simple references ("oracles") that the fast implementations are compared with."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from server.engine.request import SamplingSettings
from steering.affine import AffineMap
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings

Stack: TypeAlias = Sequence[
    tuple[Mapping[str, AffineMap] | RewardHead, AffineSettings | RewardSettings]
]


def affine(z: Tensor, site_map: AffineMap, strength: float) -> Tensor:
    """Return strength * T(z) + (1 - strength) * z for one token, coordinate by coordinate.

    T(z) is weight * z + bias. A gate scales the strength.
    """
    strength *= gate(z, site_map)
    edited = z.clone()
    for i in range(z.numel()):
        if site_map.low is not None and not z[i] >= site_map.low[i]:
            continue
        if site_map.high is not None and not z[i] <= site_map.high[i]:
            continue
        mapped = site_map.weight[i] * z[i] + site_map.bias[i]
        edited[i] = strength * mapped + (1 - strength) * z[i]
    return edited


def gate(z: Tensor, site_map: AffineMap) -> float:
    """Return a gate's sigmoid for one token, or 1 if the map has no gate."""
    if site_map.gate is None:
        return 1.0
    product = sum(a * b for a, b in zip(site_map.gate.weight.tolist(), z.tolist(), strict=True))
    return 1 / (1 + math.exp(-product - float(site_map.gate.bias)))


def affine_rows(z: Tensor, site_map: AffineMap, strength: float) -> Tensor:
    """Return `affine` of each row of an (n, d) tensor, without a loop over coordinates."""
    strengths = torch.tensor([[strength * gate(row, site_map)] for row in z])
    mapped = site_map.weight * z + site_map.bias
    edited = strengths * mapped + (1 - strengths) * z
    if site_map.low is not None and site_map.high is not None:
        edited = torch.where((z >= site_map.low) & (z <= site_map.high), edited, z)
    return edited


def reward_of(h: Tensor, head: RewardHead) -> Tensor:
    """Return the reward r(h) of one vector."""
    return head.w2 @ torch.relu(head.w1 @ h + head.b1) + head.b2


def reward(h: Tensor, head: RewardHead, settings: RewardSettings) -> Tensor:
    """Return one row refined by a reward head, whose gradient comes from autograd."""
    gap = head.positive_reward - reward_of(h, head)
    if gap > 0:
        h = h + settings.direction_scale * gap * head.direction
    for _ in range(settings.iterations):
        with torch.enable_grad():
            point = h.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(reward_of(point, head), point)
        h = h + settings.eta * gradient
    return h


def sampling_probabilities(
    logits: Sequence[float], prompt: Sequence[int], completion: Sequence[int], how: SamplingSettings
) -> list[float]:
    """Return each token's probability of being drawn next.

    The order: bias, penalties, temperature, min_p, top_k, top_p.
    """
    values = list(logits)
    for token, bias in how.logit_bias:
        values[token] += bias
    for token in {*prompt, *completion}:
        value = values[token]
        penalty = how.repetition_penalty
        values[token] = value / penalty if value > 0 else value * penalty
    for token in set(completion):
        values[token] -= how.presence_penalty + how.frequency_penalty * completion.count(token)
    best_first = sorted(range(len(values)), key=lambda token: -values[token])
    if how.temperature == 0:
        return [float(token == best_first[0]) for token in range(len(values))]
    weights = [math.exp((value - max(values)) / how.temperature) for value in values]
    kept = [token for token in best_first if weights[token] >= how.min_p]
    kept = kept[: how.top_k or None]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before / total < how.top_p:
            nucleus.append(token)
        before += weights[token]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total * (token in nucleus) for token in range(len(values))]


def mean_log_ratio(steered: Tensor, base: Tensor, tokens: Sequence[int]) -> float:
    """Return the mean over tokens of log p_steered - log p_base, in nats.

    Args:
        steered: (tokens, vocabulary) logits of the steered model, one row for each token.
        base: the base model's logits, of the same shape.
        tokens: the token ids.
    """
    total = 0.0
    for mine, other, token in zip(steered.double(), base.double(), tokens, strict=True):
        total += float(mine.log_softmax(-1)[token] - other.log_softmax(-1)[token])
    return total / len(tokens)


def dose(before: Tensor, after: Tensor) -> float:
    """Return ‖edit‖ / ‖activation‖ for one vector."""
    edit: list[float] = (after - before).tolist()
    activation: list[float] = before.tolist()
    return math.hypot(*edit) / math.hypot(*activation)


class Oracle:
    """Runs Hugging Face's model on one request at a time, without a KV cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        lm_head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert isinstance(lm_head, nn.Module)
        self._lm_head = lm_head

    def logits(
        self, tokens: Sequence[int], prompt_length: int, stack: Stack = (), last: int = 0
    ) -> Tensor:
        """Return the edited model's logits after each token, (tokens, vocabulary) float32.

        With `last` above 0, return those after the last `last` tokens only.
        """
        with ExitStack() as hooks, torch.no_grad():
            for site in dict.fromkeys(site for site in _sites(stack)):
                hooks.callback(_hook_site(self._model, site, stack, prompt_length).remove)
            hooks.callback(self._lm_head.register_forward_pre_hook(_edit_rows(stack)).remove)
            output = self._model(
                input_ids=torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=last
            )
        logits: Tensor = output.logits[0].float()
        return logits

    def greedy(
        self, prompt: Sequence[int], new_tokens: int, stack: Stack = ()
    ) -> tuple[list[int], list[Tensor]]:
        """Return greedily decoded tokens, and the row of logits that each was chosen from."""
        tokens = list(prompt)
        chosen_from = []
        for _ in range(new_tokens):
            [row] = self.logits(tokens, len(prompt), stack, last=1)
            chosen_from.append(row)
            tokens.append(int(row.argmax()))
        return tokens[len(prompt) :], chosen_from


def _sites(stack: Stack) -> list[str]:
    return [
        site for parameters, _ in stack if isinstance(parameters, Mapping) for site in parameters
    ]


def _hook_site(model: nn.Module, site: str, stack: Stack, prompt_length: int) -> RemovableHandle:
    """Edit a module's output or, at "<path>.input", the first argument of its calls."""

    def edit(given: Any) -> Any:
        if isinstance(given, tuple):
            return (edit(given[0]), *given[1:])
        return _edited(given, site, stack, prompt_length)

    def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return edit(args), kwargs
        (name, given), *others = kwargs.items()
        return args, {name: edit(given), **dict(others)}

    if site.endswith(".input"):
        module = model.get_submodule(site.removesuffix(".input"))
        return module.register_forward_pre_hook(on_call, with_kwargs=True)
    module = model.get_submodule(site)
    return module.register_forward_hook(lambda _module, _args, output: edit(output))


def _edited(activations: Tensor, site: str, stack: Stack, prompt_length: int) -> Tensor:
    z = activations.reshape(-1, activations.shape[-1]).float()
    for parameters, settings in stack:
        if not (isinstance(parameters, Mapping) and isinstance(settings, AffineSettings)):
            continue
        if site not in parameters:
            continue
        edited = affine_rows(z, parameters[site], settings.strength)
        first, last = {
            "all": (0, len(z)),
            "prompt": (0, prompt_length),
            "generated": (prompt_length, len(z)),
        }[settings.positions]
        z = torch.cat([z[:first], edited[first:last], z[last:]])
    return z.to(activations.dtype).view_as(activations)


def _edit_rows(stack: Stack) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows = args[0][0].float()
        for parameters, settings in stack:
            if isinstance(parameters, RewardHead) and isinstance(settings, RewardSettings):
                rows = torch.stack([reward(row, parameters, settings) for row in rows])
        return (rows.to(args[0].dtype)[None],)

    return hook


def penalized(
    logits: Tensor, prompt: Sequence[int], completion: Sequence[int], how: SamplingSettings
) -> Tensor:
    """Return one row's logits with bias and penalties, computed token by token in float32."""
    changed = logits.clone()
    bias: dict[int, float] = {}
    for token, added in how.logit_bias:
        bias[token] = bias.get(token, 0.0) + added
    repeated = {*prompt, *completion} if how.repetition_penalty != 1 else set(completion)
    for token in {*bias, *repeated}:
        repetition = how.repetition_penalty if token in repeated else 1.0
        count = completion.count(token)
        subtracted = how.presence_penalty + how.frequency_penalty * count if count else 0.0
        value = logits[token] + torch.tensor(bias.get(token, 0.0))
        value = value / torch.tensor(repetition) if value > 0 else value * torch.tensor(repetition)
        value = value - torch.tensor(subtracted)
        largest = torch.finfo(torch.float32).max
        changed[token] = value.clamp(-largest, largest)
    return changed


def allowed_by_choices(
    tokens: Sequence[int], choices: Sequence[Sequence[int]], end: int
) -> set[int]:
    """Return the tokens that can follow `tokens` in an answer that is one of the choices."""
    so_far = list(tokens)
    fitting = [list(each) for each in choices if list(each[: len(so_far)]) == so_far]
    return {end if each == so_far else each[len(so_far)] for each in fitting}
