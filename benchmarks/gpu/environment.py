"""Versions and the device."""

import platform
import shutil
from importlib import metadata

import torch
import transformers

from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows


def run(place: Place, rows: Rows) -> None:
    """Tell the versions, then the device and how fast its memory is."""
    rows.tell(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        # Triton compiles its launcher by it.
        c_compiler=shutil.which("gcc") or shutil.which("clang"),
    )
    with rows.attempt(device=str(place.device)):
        rows.tell(**_device(place.device), read_gb_per_s=round(place.bandwidth() / 1e9, 1))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, str | int | float]:
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
