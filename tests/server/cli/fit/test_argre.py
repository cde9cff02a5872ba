"""Tests of `steerserve fit argre`: an artifact, and refusals in one sentence."""

import json
from pathlib import Path

import torch

from interventions.artifact import read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import RewardManifest
from server.engine.torch.model.loader import load_model
from steering.fit.hidden_states import collect_hidden_states
from steering.reward import RewardHead
from tests.fitting import PAIRS, fit_argre_by_command
from tests.tiny import WIDTH


def test_argre_end_to_end(model: str, folder: Path) -> None:
    result = fit_argre_by_command(
        model, folder, "--eta", "0.25", "--name", "mild", "--description", "softer"
    )
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(folder / "tiny-argre.safetensors")
    assert artifact.digest in result.stdout
    manifest = artifact.manifest
    assert isinstance(manifest, RewardManifest)
    assert (manifest.name, manifest.description) == ("mild", "softer")
    assert (manifest.defaults.eta, manifest.defaults.iterations) == (0.25, 5)
    assert manifest.training["samples"] == 3
    loaded = load_model(model, dtype="float32")
    assert check_compatible(artifact, loaded.description) == ()
    assert isinstance(artifact.parameters, RewardHead)
    assert artifact.parameters.w1.shape == (16, WIDTH)
    ends = []
    for side in ("positive", "negative"):
        texts = [pair.get("prompt", "") + pair[side] for pair in PAIRS]
        ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
        states = collect_hidden_states(loaded.model, loaded.lm_head, ids, 1)
        ends.append(torch.stack([rows[-1] for rows in states]))
    expected = (ends[0] - ends[1]).mean(0)
    torch.testing.assert_close(artifact.parameters.direction, expected, atol=1e-4, rtol=1e-4)


def test_a_prompts_tokens_are_not_fitted_on(model: str, folder: Path) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps(PAIRS[0]))
    assert fit_argre_by_command(model, folder).exit_code == 0
    head = read_artifact(folder / "tiny-argre.safetensors").parameters
    assert isinstance(head, RewardHead)
    loaded = load_model(model, dtype="float32")
    ids = loaded.tokenizer("you are kind")["input_ids"]
    states = collect_hidden_states(loaded.model, loaded.lm_head, [ids], 1)[0][len("you are ") :]
    rewards = torch.relu(states @ head.w1.T + head.b1) @ head.w2 + head.b2
    torch.testing.assert_close(head.positive_reward, rewards.mean(), atol=1e-5, rtol=1e-4)


def test_a_default_outside_of_the_limits_is_refused(model: str, folder: Path) -> None:
    result = fit_argre_by_command(model, folder, "--eta", "-3")
    assert result.exit_code == 2
    assert "eta" in result.stderr


def test_a_continuation_beyond_max_tokens_is_refused(model: str, folder: Path) -> None:
    result = fit_argre_by_command(model, folder, "--max-tokens", "4")
    assert result.exit_code == 2
    assert "pair 1: nothing of its positive is left" in result.stderr
