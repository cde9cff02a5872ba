"""Where the model that is measured lies, and in which dtype everybody runs it."""

from pathlib import Path

from transformers import AutoConfig

from server.engine.torch.model.embedded import embedded_model_folder
from server.engine.torch.model.loader import resolve_dtype


def model_folder(model: str) -> Path:
    """The folder of "embedded", or the folder itself."""
    return embedded_model_folder(lambda _: None) if model == "embedded" else Path(model)


def default_dtype(folder: Path) -> str:
    """What `steerserve serve` runs the model in on this machine's CPU."""
    dtype = resolve_dtype("auto", "cpu", AutoConfig.from_pretrained(folder))
    return str(dtype).removeprefix("torch.")
