"""Reads folders of `<module path>.statedict`, the hooks of Apple's ml-act and ml-lineas.

github.com/apple/ml-act, act/hooks/transport.py: a hook transports a coordinate z to

    LinearOTHook                 w1 z + b1                          (LinEAS, Lin-AcT)
    GaussianOTHook               std2 / std1 (z - mu1) + mu2        (Gaussian-AcT)
    OnlyMeanHook                 z - mu1 + mu2                      (Mean-AcT)

and mixes it with z by a strength. It leaves z alone outside of an open interval between two
quantiles of the training activations; Gaussian hooks, where a standard deviation is not above 1e-4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from interventions.importers.imported import UNIT_STRENGTH, ImportedMaps, ImportFileError
from interventions.importers.local_files import sha256_of_all
from interventions.importers.sites import check_site
from interventions.importers.torch_files import read_torch_mapping, row_vector
from interventions.model import ModelDescription
from steering.affine import AffineMap

SUFFIX: Final = ".statedict"

GaussianKind: TypeAlias = Literal["mean", "gaussian"]

_State: TypeAlias = Mapping[str, object]
_GAUSSIAN: Final = ("mu1", "mu2", "std1", "std2")
_LEAST_DEVIATION: Final = 1e-4  # GaussianOTHook's std_eps
_ALL: Final = "q_all"  # stands for every value between -1e6 and 1e6
_FILE_NAME: Final = re.compile(rf"(?P<module>.+?)(?::(?P<output>\d+))?{re.escape(SUFFIX)}")


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """The parts of a hook that its file does not tell."""

    quantiles: str | None = None  # such as "q_0_100"; None for those that the hook was saved with
    gaussian: GaussianKind | None = None  # None: to be read from the folder's name


def statedict_files(folder: Path) -> list[Path]:
    """Return the hooks' files in a folder, by name.

    Raises:
        ImportFileError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except OSError as error:
        raise ImportFileError(f"{folder}: {error.strerror}.") from error


def read_transport(
    folder: Path, model: ModelDescription, linear_method: str, options: TransportOptions
) -> ImportedMaps:
    """Read the transport maps in a folder.

    Args:
        folder: with one file for each hooked module.
        model: to be edited.
        linear_method: the method of linear hooks, which look alike in both projects.
        options: what the files do not tell.

    Raises:
        ImportFileError: the folder has no hooks, hooks of several kinds, or a hook that cannot be
            read or does not fit the model.
    """
    files = statedict_files(folder)
    if not files:
        raise ImportFileError(f"{folder} holds no file <module path>{SUFFIX}.")
    maps: dict[str, AffineMap] = {}
    methods: dict[str, Path] = {}
    for path in files:
        site = _site(path)
        if site in maps:
            raise ImportFileError(f'{path}: another file is of the module "{site}" too.')
        state = read_torch_mapping(path)
        method = _method(path, state, linear_method, options.gaussian)
        methods.setdefault(method, path)
        if len(methods) > 1:
            found = " and ".join(f"{each.name} ({method})" for method, each in methods.items())
            raise ImportFileError(f"{folder} mixes hooks of several methods: {found}.")
        maps[site] = _map(path, state, method, options.quantiles)
        check_site(path, site, maps[site].weight.numel(), model)
    [method] = methods
    return ImportedMaps(
        parameters=maps,
        method=method,
        strength=UNIT_STRENGTH,
        training={
            "folder": folder.resolve().name,
            "files": len(files),
            "files_sha256": sha256_of_all(files),
            "quantiles": options.quantiles or "as saved",
        },
    )


def _site(path: Path) -> str:
    """Return the site of a hook's file: the output of a module, or a tuple's first item."""
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        raise ImportFileError(f"{path}: its name holds no module path.")
    if int(match["output"] or 0) != 0:
        raise ImportFileError(
            f"{path} edits item {match['output']} of a module's output; only item 0 can be edited."
        )
    return match["module"]


def _method(path: Path, state: _State, linear: str, gaussian: GaussianKind | None) -> str:
    if "net.w1" in state:
        return linear
    if not all(name in state for name in _GAUSSIAN):
        raise ImportFileError(
            f"{path} has neither net.w1 and net.b1 nor mu1, mu2, std1 and std2: it is not the hook "
            "of LinEAS, Lin-AcT, Mean-AcT or Gaussian-AcT."
        )
    if linear == "lineas":
        raise ImportFileError(
            f"{path} is not a hook of LinEAS, but of Mean-AcT or Gaussian-AcT: import the folder "
            "by ml-act."
        )
    # Both hooks save the same; ml-act's folders are named after its settings, as incr-mean_ot-mean.
    kind = gaussian or _kind_in(path.parent.resolve().name)
    if kind is None:
        raise ImportFileError(
            f"{path} is of Mean-AcT or of Gaussian-AcT, which save the same tensors: say which by "
            "--map mean or --map gaussian."
        )
    return "mean" if kind == "mean" else "gaussian-act"


def _kind_in(folder: str) -> GaussianKind | None:
    if "gaussian_ot" in folder:
        return "gaussian"
    return "mean" if "mean_ot" in folder or "only_mean" in folder else None


def _is_other_parameter(name: str) -> bool:
    return name.startswith("net.") and name not in ("net.w1", "net.b1")


def _map(path: Path, state: _State, method: str, quantiles: str | None) -> AffineMap:
    if "net.w1" in state:
        if others := sorted(name for name in state if _is_other_parameter(name)):
            raise ImportFileError(
                f"{path} has {others[0]} beside net.w1 and net.b1: the hook is no map of single "
                "coordinates, and cannot be served."
            )
        weight = row_vector(path, "net.w1", state["net.w1"])
        bias = row_vector(path, "net.b1", state.get("net.b1"), weight.numel())
        edited = torch.ones_like(weight, dtype=torch.bool)
    else:
        weight, bias, edited = _gaussian(path, state, only_mean=method == "mean")
    interval = _interval(path, state, quantiles, edited)
    if interval is None:
        return AffineMap(_where(edited, weight, 1), _where(edited, bias, 0))
    # The hook's interval is open, and a support is closed: its ends are the next floats inside.
    low = torch.nextafter(interval[0], torch.tensor(torch.inf))
    high = torch.nextafter(interval[1], torch.tensor(-torch.inf))
    edited &= low <= high
    return AffineMap(
        _where(edited, weight, 1), _where(edited, bias, 0), low, torch.where(edited, high, low)
    )


def _gaussian(path: Path, state: _State, *, only_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, bias, and the coordinates that the hook edits."""
    first = row_vector(path, "mu1", state["mu1"])
    rest = (row_vector(path, name, state[name], first.numel()) for name in _GAUSSIAN[1:])
    mu1, mu2, std1, std2 = (each.double() for each in (first, *rest))
    edited = (std1 > _LEAST_DEVIATION) & (std2 > _LEAST_DEVIATION)
    ratio = std2 / _where(edited, std1, 1)
    weight = torch.ones_like(mu1) if only_mean else ratio
    bias = mu2 - weight * mu1
    return weight.float(), bias.float(), edited


def _interval(
    path: Path, state: _State, quantiles: str | None, edited: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the ends of the open interval outside of which the hook edits nothing, if any."""
    saved = state.get("quantiles_src", _ALL) if quantiles is None else quantiles
    if isinstance(saved, str):
        if saved == _ALL:
            return None
        table = state.get("quantiles_dict_src")
        known = list(table) if isinstance(table, Mapping) else []
        if not isinstance(table, Mapping) or saved not in table:
            names = ", ".join(map(str, [_ALL, *known]))
            raise ImportFileError(f"{path} has no quantiles {saved!r}; it has {names}.")
        return _ends(path, f"quantiles_dict_src.{saved}", table[saved], edited, whole=True)
    return _ends(path, "quantiles_src", saved, edited, whole=False)


def _ends(
    path: Path, name: str, value: object, edited: Tensor, *, whole: bool
) -> tuple[Tensor, Tensor] | None:
    """Return two ends; those that a Gaussian hook saves are of the edited coordinates only."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ImportFileError(f'{path}: "{name}" is not a pair.')
    if all(isinstance(end, int | float) for end in value):
        return None  # -1e6 and 1e6
    count = edited.numel() if whole else int(edited.sum())
    if count == 0:
        return None
    ends = []
    for index, end in enumerate(value):
        vector = row_vector(path, f"{name}.{index}", end, count)
        if not whole:
            vector = torch.zeros(edited.shape).masked_scatter(edited, vector)
        ends.append(vector)
    return ends[0], ends[1]


def _where(edited: Tensor, values: Tensor, otherwise: float) -> Tensor:
    return torch.where(edited, values, otherwise)
