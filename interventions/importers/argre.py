"""Reads a reward head of the ARGRE authors' code (github.com/xiaoyisong/ARGRE).

`train_hidden/rm_trainer.py` saves the head, a `Sequential(Linear, ReLU, Linear)`, as
`best_score_model.pth`. `collect_hidden/` saves in a folder of its own `train_hidden_states.pt`, the
hidden states of N pairs of texts (N, 2, tokens, d), the positive first; their mask, (N, 2, tokens);
and `direction.pt`, (1, 1, d). The mean reward of the positives is not saved: `argre_infer.py`
computes it from these states each time, as this module does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from interventions.importers.imported import ImportedHead, ImportFileError
from interventions.importers.local_files import sha256_of
from interventions.importers.torch_files import (
    checked_tensor,
    float_tensor,
    read_torch_file,
    read_torch_mapping,
)
from interventions.model import ModelDescription
from steering.reward import RewardHead, reward

HEAD_FILE: Final = "best_score_model.pth"
DIRECTION_FILE: Final = "direction.pt"
STATES_FILE: Final = "train_hidden_states.pt"
MASK_FILE: Final = "train_attention_mask.pt"

_HEAD_TENSORS: Final = ("0.weight", "0.bias", "2.weight", "2.bias")
_PAIRS_AT_ONCE: Final = 8


def read_argre(
    head_file: Path,
    states_folder: Path,
    model: ModelDescription,
    positive_reward: float | None,
    on_step: Callable[[int, int], None] | None = None,
) -> ImportedHead:
    """Read a head and its direction, and compute the mean reward of the positives.

    Args:
        head_file: the head, or a folder with best_score_model.pth.
        states_folder: with direction.pt, and with the hidden states and their mask.
        model: to be edited.
        positive_reward: the mean reward, if known; the hidden states are then not read.
        on_step: called with the number of pairs that were read, and that of all pairs.

    Raises:
        ImportFileError: a file is missing, cannot be read, or does not fit the model.
    """
    if positive_reward is not None and not abs(positive_reward) <= torch.finfo(torch.float32).max:
        raise ImportFileError(f"{head_file}: the given positive reward is not a finite number.")
    path = head_file / HEAD_FILE if head_file.is_dir() else head_file
    w1, b1, w2, b2 = _head_tensors(path)
    width = w1.shape[1]
    if width != model.head_width:
        raise ImportFileError(
            f"{path} takes states of width {width}, but those before lm_head of the model "
            f"{model.id} have width {model.head_width}: the head is of another model."
        )
    direction_file = states_folder / DIRECTION_FILE
    direction = float_tensor(
        direction_file, "the direction", read_torch_file(direction_file), (1, 1, width)
    )
    parts = (w1, b1, w2.reshape(-1), b2.reshape(()), direction.reshape(-1))
    head = RewardHead(*parts, positive_reward=torch.zeros(()))
    tokens = 0
    if positive_reward is None:
        positive_reward, tokens = _mean_positive_reward(head, states_folder, on_step)
    return ImportedHead(
        parameters=RewardHead(*parts, positive_reward=torch.tensor(positive_reward)),
        training={
            "head": path.name,
            "head_sha256": sha256_of(path),
            "direction_sha256": sha256_of(direction_file),
            "positive_reward": positive_reward,
            "positive_tokens": tokens or "not read: the positive reward was given",
        },
    )


def _head_tensors(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = read_torch_mapping(path)
    if set(state) != set(_HEAD_TENSORS):
        raise ImportFileError(
            f"{path} does not hold the tensors {', '.join(_HEAD_TENSORS)} of ARGRE's head."
        )
    w1 = float_tensor(path, "0.weight", state["0.weight"], (None, None))
    units = w1.shape[0]
    return (
        w1,
        float_tensor(path, "0.bias", state["0.bias"], (units,)),
        float_tensor(path, "2.weight", state["2.weight"], (1, units)),
        float_tensor(path, "2.bias", state["2.bias"], (1,)),
    )


def _mean_positive_reward(
    head: RewardHead, folder: Path, on_step: Callable[[int, int], None] | None
) -> tuple[float, int]:
    """Return the mean reward of the positives' tokens, and their number.

    The hidden states are memory-mapped, and read a few pairs at a time.
    """
    path, mask_path = folder / STATES_FILE, folder / MASK_FILE
    states = checked_tensor(path, "the hidden states", read_torch_file(path))
    mask = checked_tensor(
        mask_path, "the attention mask", read_torch_file(mask_path), is_float=False
    )
    width = head.w1.shape[1]
    if states.dim() != 4 or states.shape[1] != 2 or states.shape[3] != width:
        raise ImportFileError(
            f"{path} has shape {tuple(states.shape)}; expected (pairs, 2, tokens, {width})."
        )
    if mask.shape != states.shape[:3]:
        raise ImportFileError(
            f"{mask_path} has shape {tuple(mask.shape)}; expected {tuple(states.shape[:3])}, as "
            f"{path.name}."
        )
    total, tokens = 0.0, 0
    for first in range(0, len(states), _PAIRS_AT_ONCE):
        chosen = slice(first, first + _PAIRS_AT_ONCE)
        rows = states[chosen, 0][mask[chosen, 0] != 0].float()
        rewards = reward(head, rows)
        if not torch.isfinite(rewards).all():
            raise ImportFileError(
                f"{path}: a reward of its pair {first + 1} or soon after is not finite."
            )
        total += float(rewards.double().sum())
        tokens += len(rows)
        if on_step is not None:
            on_step(min(first + _PAIRS_AT_ONCE, len(states)), len(states))
    if tokens == 0:
        raise ImportFileError(f"{mask_path} masks every token, so no reward can be computed.")
    return total / tokens, tokens
