"""Tells the versions and the device."""

import platform
import shutil
from importlib import metadata

import torch
import transformers

from benchmarks.gpu.page import Page, Value
from benchmarks.gpu.place import Place


def run(place: Place, page: Page) -> None:
    """Tell the versions, then the device and how fast its memory is."""
    page.tell(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        c_compiler=shutil.which("gcc") or shutil.which("clang"),  # for Triton's launcher
    )
    with page.attempt(device=str(place.device)):
        page.tell(**_device(place.device), read_gb_per_s=round(place.bandwidth() / 1e9, 1))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Value]:
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gb": round(total / 1e9, 2),
        "free_gb": round(free / 1e9, 2),
    }
