"""Shows that an edit at each site, and before `lm_head`, reaches the logits of a started vLLM.

It sends requests through the whole of vLLM, as clients' requests go, so that it tests the compiled
model, the scheduler and the sampler too.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import safetensors.torch
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from interventions.layout import to_tensors
from interventions.model import ModelDescription
from server.config import ConfigurationError
from server.engine.probes import complete_map, probe_head, probe_map
from server.engine.vllm.plugin.wire import Layout, LoadedEdit, Steering
from steering.affine import AffineMap, AffineParameters
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings

_TOKENS: Final = 2  # one token attends to itself alone, so edits of queries and keys do nothing
_ALTERNATIVES: Final = 20  # log-probabilities that are compared
_LEAST: Final = 1e-3  # of a difference in log-probability, beside the noise of two equal requests
_NAMED: Final = 8  # sites that an error message names


class SelfTest:
    """Probes a started vLLM. All slots are free, and overwritten."""

    def __init__(
        self,
        llm: Any,
        call: Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]],
        layout: Layout,
        model: ModelDescription,
    ) -> None:
        self._llm = llm
        self._call = call
        self._layout = layout
        self._model = model
        self._requests = 0

    async def run(self) -> None:
        """Probe every site on every rank.

        Raises:
            ConfigurationError: an edit does not reach the logits, or a site is on no rank.
        """
        ranks = await self._call("steering_sites", ())
        found = {site for sites in ranks for site in sites}
        if missing := [site for site in self._layout.sites if site not in found]:
            raise ConfigurationError(f"vLLM's model has no module for {_named(missing)}")
        edit = await self._load(1, probe_head(self._model.head_width))
        [base, reward] = await self._compared([(), (LoadedEdit(1, edit, _REWARD),)])
        if not _differ(base, reward, _LEAST):
            raise ConfigurationError("an edit before lm_head does not reach the logits of vLLM")
        dead: list[str] = []
        # A compiled model edits by the one itself, and by the other calls an operator.
        for probe in (probe_map, complete_map):
            for first in range(0, len(self._layout.sites), self._layout.slots):
                sites = self._layout.sites[first : first + self._layout.slots]
                dead += await self._dead(sites, probe)
        if dead:
            raise ConfigurationError(f"an edit at {_named(dead)} does not reach the logits of vLLM")

    async def _dead(self, sites: Sequence[str], probe: Callable[[int], AffineMap]) -> list[str]:
        """Return the sites at which an edit does not reach the logits; a slot for each."""
        stacks: list[tuple[LoadedEdit, ...]] = [()]
        for slot, site in enumerate(sites, start=1):
            maps = {site: probe(self._model.site_widths[site])}
            stacks.append((LoadedEdit(slot, await self._load(slot, maps), AffineSettings(1.0)),))
        # There is an unedited request at each end: their difference shows how much logits depend on
        # a row's place in the batch.
        base, *probed, again = await self._compared([*stacks, ()])
        noise = max((abs(base[token] - again.get(token, math.inf)) for token in base), default=0.0)
        threshold = 4 * noise + _LEAST
        return [
            site
            for site, edited in zip(sites, probed, strict=True)
            if not _differ(base, edited, threshold)
        ]

    async def _load(self, slot: int, parameters: AffineParameters | RewardHead) -> str:
        """Fill a slot with what a probe applies; return its name, which no artifact has."""
        name = f"probe {self._requests} in slot {slot}"
        tensors = {key: tensor.clone() for key, tensor in to_tensors(parameters).items()}
        await self._call("steering_load", (slot, name, safetensors.torch.save(tensors)))
        return name

    async def _compared(self, stacks: Sequence[tuple[LoadedEdit, ...]]) -> list[dict[int, float]]:
        """Return for each stack the best next tokens' log-probabilities, all in one batch."""
        return await asyncio.gather(*(self._next_token(stack) for stack in stacks))

    async def _next_token(self, edits: tuple[LoadedEdit, ...]) -> dict[int, float]:
        self._requests += 1
        vocabulary = self._model.vocab_size
        prompt = [(place + 1) * (vocabulary // (_TOKENS + 2)) for place in range(_TOKENS)]
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprobs=min(_ALTERNATIVES, vocabulary),
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
            extra_args=Steering(edits).to_extra_args(),
        )
        name = f"self-test-{self._requests}"
        # Each has K/V of its own, which no request finds afterwards.
        outputs = self._llm.generate(tokens_input(prompt, cache_salt=name), parameters, name)
        found: dict[int, float] = {}
        async for output in outputs:
            found = {token: each.logprob for token, each in output.outputs[0].logprobs[0].items()}
        return found


_REWARD: Final = RewardSettings(eta=1.0, iterations=1, direction_scale=1.0)


def _differ(base: Mapping[int, float], other: Mapping[int, float], threshold: float) -> bool:
    """Return whether two requests have other best tokens, or other log-probabilities of them."""
    if base.keys() != other.keys():
        return True
    return any(not abs(base[token] - other[token]) <= threshold for token in base)


def _named(sites: Sequence[str]) -> str:
    return f"{', '.join(sites[:_NAMED])}{', ...' if len(sites) > _NAMED else ''}"
