"""Tests of `steerserve fit argre`: an artifact, and refusals in one sentence."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import RewardManifest
from server.cli.fit import output
from server.engine.torch.model.loader import load_model
from steering.fit import hidden_states, reward_training
from steering.fit.hidden_states import collect_hidden_states
from steering.reward import RewardHead
from tests.disk import FaultyDisk, watching
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
    training = manifest.training
    assert training["samples"] == 3
    # The authors' settings, and what became of them with three pairs.
    settings = {
        "direction": "mean-difference",
        "interpolations": 7,
        "beta": 0.05,
        "center": 0.01,
        "weight_decay": 0.05,
        "warmup_steps": 100,
        "held_out": 0.1,
        "reward_quantile": None,
        "training_pairs": 3,
        "held_out_pairs": 0,
        "held_out_accuracy": None,
        "best_epoch": 3,
    }
    assert {key: training[key] for key in settings} == settings
    assert "neutral" not in training
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


def test_each_side_may_have_a_prompt_of_its_own(model: str, folder: Path) -> None:
    pair = {
        "positive_prompt": "you are ",
        "positive": "kind",
        "negative_prompt": "all of them are so ",
        "negative": "awful",
    }
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    assert fit_argre_by_command(model, folder).exit_code == 0
    artifact = read_artifact(folder / "tiny-argre.safetensors")
    head = artifact.parameters
    assert isinstance(head, RewardHead)
    loaded = load_model(model, dtype="float32")
    states = {}
    for side in ("positive", "negative"):
        prompt = pair[f"{side}_prompt"]
        ids = loaded.tokenizer(prompt + pair[side])["input_ids"]
        (rows,) = collect_hidden_states(loaded.model, loaded.lm_head, [ids], 1)
        states[side] = rows[len(loaded.tokenizer(prompt)["input_ids"]) :]
    difference = states["positive"][-1] - states["negative"][-1]
    torch.testing.assert_close(head.direction, difference, atol=1e-4, rtol=1e-4)
    gaps = {}
    for side, rows in states.items():
        rewards = torch.relu(rows @ head.w1.T + head.b1) @ head.w2 + head.b2
        gaps[side] = torch.relu(head.positive_reward - rewards).mean().item()
    # Neither side's prompt counts.
    assert artifact.manifest.training["positive_gap"] == pytest.approx(gaps["positive"], abs=1e-5)
    assert artifact.manifest.training["negative_gap"] == pytest.approx(gaps["negative"], abs=1e-5)


def test_a_default_outside_of_the_limits_is_refused(model: str, folder: Path) -> None:
    result = fit_argre_by_command(model, folder, "--eta", "-3")
    assert result.exit_code == 2
    assert "eta" in result.stderr


def test_a_continuation_beyond_max_tokens_is_refused(model: str, folder: Path) -> None:
    result = fit_argre_by_command(model, folder, "--max-tokens", "4")
    assert result.exit_code == 2
    assert "pair 1: nothing of its positive is left" in result.stderr


def _write_pairs(folder: Path, count: int) -> None:
    pairs = [
        {"prompt": f"{number} is ", "positive": f"kind {number}", "negative": f"vile {number}"}
        for number in range(count)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_all_options_reach_the_fit_and_the_manifest(model: str, folder: Path) -> None:
    _write_pairs(folder, 20)
    neutral = str(folder / "neutral.txt")
    options = {
        "--direction": "principal-component",
        "--held-out": "0.25",
        "--interpolations": "3",
        "--beta": "0.1",
        "--center": "0.02",
        "--weight-decay": "0.01",
        "--warmup-steps": "1",
        "--reward-quantile": "0.3",
        "--epochs": "2",
        "--batch-size": "3",
        "--seed": "4",
        "--neutral": neutral,
        "--neutral-weight": "0.5",
        "--learning-rate": "0.002",
    }
    more = [part for option in options.items() for part in option]
    result = fit_argre_by_command(model, folder, "--json", *more)
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(folder / "tiny-argre.safetensors")
    head = artifact.parameters
    assert isinstance(head, RewardHead)
    assert head.direction.norm().item() == pytest.approx(1, abs=1e-5)
    training = artifact.manifest.training
    for option, value in options.items():
        recorded = training[option.removeprefix("--").replace("-", "_")]
        assert str(recorded) == (Path(value).name if option == "--neutral" else value)
    assert (training["training_pairs"], training["held_out_pairs"]) == (15, 5)
    assert training["neutral_samples"] == 3
    assert training["neutral_sha256"] == hashlib.sha256(Path(neutral).read_bytes()).hexdigest()
    assert training["best_epoch"] in (1, 2)
    summary = json.loads(result.stdout)
    assert summary["held_out_accuracy"] == training["held_out_accuracy"]
    assert summary["neutral_gap"] == training["neutral_gap"]
    assert str(folder) not in artifact.manifest.model_dump_json()


def test_a_seed_and_a_date_make_the_same_bytes(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")
    _write_pairs(folder, 20)
    digests = [
        json.loads(fit_argre_by_command(model, folder, "--json", "--seed", seed).stdout)["digest"]
        for seed in ("0", "0", "1")
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", "1e30"), "lower the learning rate"),
        (("--held-out", "1"), "held_out must be a share"),
        (("--reward-quantile", "2"), "reward_quantile must be from 0 to 1"),
        (("--beta", "0"), "beta and learning_rate must be positive"),
        (("--direction", "up"), "up"),
        (("--neutral", "gone.txt"), "gone.txt: No such file"),
        (("--spool", "/nowhere"), "in a file in /nowhere (No such file"),
        (("--samples", "1", "--direction", "principal-component"), "along the mean difference"),
        (("--samples", "9"), "--samples 9: "),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence_and_no_file(
    model: str, folder: Path, options: tuple[str, ...], message: str
) -> None:
    before = sorted(folder.iterdir())
    result = fit_argre_by_command(model, folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(folder.iterdir()) == before


def test_more_tokens_than_the_model_has_positions_are_refused(model: str, folder: Path) -> None:
    (folder / "neutral.txt").write_text("a b c " * 10_000)
    options = ("--neutral", str(folder / "neutral.txt"), "--max-tokens", "100000")
    result = fit_argre_by_command(model, folder, *options)
    assert result.exit_code == 2
    assert "positions: give at most" in result.stderr


def test_pairs_without_a_difference_are_refused(model: str, folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"positive": "same", "negative": "same"}\n')
    result = fit_argre_by_command(model, folder)
    assert result.exit_code == 2
    assert "no direction" in result.stderr


def test_a_neutral_text_without_a_token_is_refused_with_its_line(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = output.tokenize
    monkeypatch.setattr(
        output,
        "tokenize",
        lambda loaded, text, most: [] if text == "what a person" else tokenize(loaded, text, most),
    )
    result = fit_argre_by_command(model, folder, "--neutral", str(folder / "neutral.txt"))
    assert result.exit_code == 2
    assert "neutral.txt:2: " in result.stderr


def test_a_loss_that_rose_is_said(model: str, folder: Path) -> None:
    settled = fit_argre_by_command(model, folder)
    assert "Warning" not in settled.stderr
    diverged = fit_argre_by_command(
        model,
        folder,
        *("--neutral", str(folder / "neutral.txt")),
        *("--learning-rate", "3", "--epochs", "8"),
    )
    assert diverged.exit_code == 0, diverged.stderr
    assert "Warning: the loss rose from " in diverged.stderr
    training = read_artifact(folder / "tiny-argre.safetensors").manifest.training
    assert float(training["final_loss"] or 0) > float(training["initial_loss"] or 0)


def test_a_full_disk_leaves_the_older_artifact(model: str, folder: Path) -> None:
    path = folder / "tiny-argre.safetensors"
    path.write_bytes(b"older")
    before = sorted(folder.iterdir())
    disk = FaultyDisk(0, errno.ENOSPC, lasting=True)
    with watching(folder, disk.before):
        result = fit_argre_by_command(model, folder)
    assert disk.refused
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert path.read_bytes() == b"older"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("moment", ["stream_hidden_states", "preference_loss"])
def test_an_interrupt_leaves_no_file(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    module = hidden_states if moment == "stream_hidden_states" else reward_training
    monkeypatch.setattr(module, moment, interrupted)
    before = sorted(folder.iterdir())
    result = fit_argre_by_command(model, folder)
    assert result.exit_code == 130
    assert "Interrupted: no artifact was written" in result.stderr
    assert sorted(folder.iterdir()) == before
