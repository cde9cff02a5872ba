"""The model that is measured: its folder, its dtype, and an engine that runs it."""

from pathlib import Path

from transformers import AutoConfig

from benchmarks.decoding import BenchEngine
from interventions.artifact import read_artifact
from interventions.bundled import bundled_artifacts
from server.engine.model.description import resolve_dtype
from server.engine.model.embedded import embedded_model_folder
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from steering.reward import RewardHead

_PROMPT_TOKENS = 8192  # all prompts are read in one step, before anything is measured
_MAPS = "detox-lineas"  # the bundled artifact whose maps are measured: it has the most sites
# A prompt that the prefix cache has would be read in another way than others.
OPTIONS = EngineOptions(
    compile_layers=True,
    compile_at_once=True,  # a server compiles layers when steps have wanted them for a while
    max_batch_tokens=_PROMPT_TOKENS,
    prefill_tokens=_PROMPT_TOKENS,
    prefix_cache=False,
)


def model_folder(model: str) -> Path:
    """Return the folder of "embedded", or the given folder."""
    return embedded_model_folder(lambda _: None) if model == "embedded" else Path(model)


def default_dtype(folder: Path) -> str:
    """Return the dtype that `steerserve serve` chooses for the model on this machine's CPU."""
    dtype = resolve_dtype("auto", "cpu", AutoConfig.from_pretrained(folder))
    return str(dtype).removeprefix("torch.")


def open_engine(model: str, device: str = "cpu") -> BenchEngine:
    """Load a model with its bundled interventions, or random ones of the same sizes.

    Args:
        model: "embedded", a folder or a Hugging Face id.
    """
    loaded = load_model(model, device=device)
    maps, head = None, None
    if model == "embedded":
        for path in bundled_artifacts():
            parameters = read_artifact(path).parameters
            if isinstance(parameters, RewardHead):
                head = parameters
            elif path.stem == _MAPS:
                maps = parameters
    engine = BenchEngine(loaded, OPTIONS, maps, head)
    engine.reach_full_speed()
    return engine
