"""Compiles and loads `refine.cpp`, which refines rows of several reward heads on a CPU."""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from steering.prepared_head import PreparedHead

_SOURCE: Final = Path(__file__).with_name("refine.cpp")
# -Wno-psabi: vectors wider than the processor's registers are passed only between functions of
# refine.cpp, so a warning about their calling convention does not matter.
_FLAGS: Final = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-Wno-psabi", "-shared", "-fPIC"]
_SECONDS: Final = 60.0  # the compiler's time limit; it normally takes less than 1


class NativeBuildError(Exception):
    """refine.cpp could not be compiled or loaded; the message says why."""


class NativeRefinement:
    """Does what `apply_reward` does, on a CPU, for the rows of several heads in one call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._refine = library.refine
        self._refine.restype = None
        self._refine.argtypes = (
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
            c_int64,
            c_void_p,
            c_int64,
        )

    def __call__(
        self,
        h: Tensor,
        heads: Sequence[tuple[PreparedHead, int]],
        direction_scale: Tensor,
        step_sizes: Tensor,
    ) -> Tensor:
        """Refine n rows; see `apply_reward`.

        Args:
            h: (n, d) float32.
            heads: each head, of width d, and the number of its rows; `h` has the rows of the first
                head first, then those of the second, and so on.
            direction_scale, step_sizes: (n, 1) and (n, most iterations) float32.

        Returns:
            (n, d) float32.
        """
        assert h.dtype == torch.float32, "addresses know no dtype"
        assert len(h) == sum(rows for _, rows in heads), "addresses know no end"
        width = heads[0][0].width
        refined = h.clone(memory_format=torch.contiguous_format)
        if width > h.shape[1]:
            refined = pad(refined, (0, width - h.shape[1]))
        table = [field for head, rows in heads for field in (*head.fields, rows)]
        scales, sizes = direction_scale.contiguous(), step_sizes.contiguous()
        self._refine(
            (c_int64 * len(table))(*table),
            len(heads),
            scales.data_ptr(),
            sizes.data_ptr(),
            sizes.shape[1],
            refined.data_ptr(),
            torch.get_num_threads(),
        )
        return refined[:, : h.shape[1]]


def build_native(folder: Path) -> NativeRefinement:
    """Compile refine.cpp with the machine's C++ compiler ($CXX, else g++) and load it.

    Args:
        folder: an existing folder from which libraries may be loaded; the build cleans up there.

    Raises:
        NativeBuildError: there is no compiler, or it fails, or the library cannot be loaded.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        # Some file systems do not delete a library while it is loaded.
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
            library = Path(own) / "refine.so"
            subprocess.run(
                [*compiler, *_FLAGS, str(_SOURCE), "-o", str(library)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
            )
            return NativeRefinement(ctypes.CDLL(str(library)))
    except subprocess.CalledProcessError as error:
        raise NativeBuildError(f"{error.cmd[0]} failed: {error.stderr.strip()}") from error
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(str(error)) from error
