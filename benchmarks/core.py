"""The engine in this process: its model, and the interventions that are measured."""

import time
from dataclasses import dataclass

from benchmarks.random_edits import random_head, random_maps
from interventions.artifact import read_artifact
from interventions.bundled import bundled_artifacts
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import LoadedModel, load_model
from server.engine.torch.options import EngineOptions
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from steering.sites import default_sites, match_sites

POLL_SECONDS = 0.1
_PROMPT_TOKENS = 8192  # all prompts are read in one step, before anything is measured
# Without a prefix cache, as prompts that it has would be read in another way than others.
OPTIONS = EngineOptions(
    compile_layers=True,
    compile_at_once=True,  # a server's layers are compiled when steps have wanted it for a while
    max_batch_tokens=_PROMPT_TOKENS,
    prefill_tokens=_PROMPT_TOKENS,
    prefix_cache=False,
)
ARGRE = RewardSettings(eta=0.5, iterations=5, direction_scale=1.0)
LINEAS = AffineSettings(1.0)


class BenchmarkError(Exception):
    """Something was not measured, with a sentence that says why."""


@dataclass(slots=True)
class Bench:
    """An engine at full speed, with the interventions that are measured on it, by digest."""

    loaded: LoadedModel
    core: EngineCore
    parameters: dict[str, Parameters]
    lineas: str  # the digest of an affine intervention at all default sites
    argre: str  # the digest of a reward intervention
    gated: str = "gated"  # an affine intervention at the same sites, each of whose maps has a gate

    @property
    def dtype(self) -> str:
        """The model's, for people."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    @property
    def default_sites(self) -> tuple[str, ...]:
        """Where an affine intervention of this model edits by default."""
        pattern = default_sites(type(self.loaded.model).__name__)
        return match_sites(pattern, self.loaded.description.site_widths)


def open_bench(model: str, device: str = "cpu") -> Bench:
    """Load a model with its bundled interventions, or random ones of the same sizes.

    Args:
        model: "embedded", a folder or a Hugging Face id.
    """
    loaded = load_model(model, device=device)
    core = build_core(loaded, OPTIONS)
    if model == "embedded":
        artifacts = [read_artifact(path) for path in bundled_artifacts()]
        parameters: dict[str, Parameters] = {each.digest: each.parameters for each in artifacts}
        digests = {each.manifest.kind: each.digest for each in artifacts}
        bench = Bench(loaded, core, parameters, digests["affine"], digests["reward"])
    else:
        bench = Bench(loaded, core, {}, "lineas", "argre")
        bench.parameters["lineas"] = random_maps(loaded, bench.default_sites, 0)
        bench.parameters["argre"] = random_head(loaded, 0)
    bench.parameters[bench.gated] = random_maps(loaded, bench.default_sites, 0, gated=True)
    at_full_speed(core)
    return bench


def at_full_speed(core: EngineCore) -> None:
    """Wait until the engine runs as fast as it ever will."""
    while core.compiling:
        if not core.make_pending():
            time.sleep(POLL_SECONDS)


def head_bytes(head: RewardHead) -> int:
    """The parameters of a head, as they are stored."""
    tensors = (head.w1, head.b1, head.w2, head.b2, head.direction, head.positive_reward)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
