"""Builds the engine on vLLM. Imported only where vLLM is chosen, after `prepare_environment`."""

from collections.abc import Callable, Iterable
from pathlib import Path

from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.served_model import describe_served_model


def build_engine(
    model: str,
    dtype: str,
    options: VllmOptions,
    path: Callable[[str], Path],
    stored_sites: Iterable[str],
    report: Callable[[str], None],
) -> VllmEngine:
    """Start vLLM with a model. Call it in a thread without an event loop.

    Args:
        model: "embedded", a folder or a Hugging Face id.
        dtype: auto, float32, bfloat16 or float16.
        options: the operator's.
        path: returns the file of an artifact that is stored and checked, by its digest.
        stored_sites: those of all stored artifacts.
        report: called with a sentence about each step that takes time.

    Raises:
        ModelLoadError: the model cannot be loaded.
        ConfigurationError: vLLM refuses an option, or steering does not work with it.
    """
    served = describe_served_model(model, dtype, options, stored_sites, report)
    report(f"starting vLLM with {served.description.architecture}, {served.dtype}")
    return VllmEngine(served, path, options)
