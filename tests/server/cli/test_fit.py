"""Tests of `steerserve fit`: from training files to an artifact, and refusals in one sentence."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from interventions.artifact import read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import AffineManifest, RewardManifest
from server.__main__ import app
from server.cli.training_files import TrainingFileError, read_lines, read_pairs
from server.engine.torch.model.loader import LoadedModel, load_model
from steering.fit.activations import collect_hidden_states
from steering.reward import RewardHead
from tests.tiny import SITES, WIDTH

_PAIRS = [
    {"prompt": "you are ", "positive": "kind", "negative": "awful"},
    {"positive": "a fine day", "negative": "a vile day"},
    {"prompt": "", "positive": "good", "negative": "bad"},
]


@pytest.fixture
def model(tiny_folders: Mapping[str, Path]) -> str:
    return str(tiny_folders["llama"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toxic.txt").write_text("you fool\nwhat an idiot\nutter rubbish\n")
    (tmp_path / "neutral.txt").write_text("you there\nwhat a person\nnot for me\n")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in _PAIRS))
    return tmp_path


def _lineas(model: str, folder: Path, *more: str) -> Result:
    files = {"--source": "toxic.txt", "--target": "neutral.txt", "--out": "tiny-lineas.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    small = ["--model", model, "--dtype", "float32", "--samples", "3", "--steps", "3"]
    return CliRunner().invoke(app, ["fit", "lineas", *options, *small, *more])


def _argre(model: str, folder: Path, *more: str) -> Result:
    files = {"--pairs": "pairs.jsonl", "--out": "tiny-argre.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    small = ["--model", model, "--dtype", "float32", "--hidden-units", "16"]
    return CliRunner().invoke(app, ["fit", "argre", *options, *small, *more])


def _load(model: str) -> LoadedModel:
    return load_model(model, dtype="float32")


def test_lineas_end_to_end(model: str, folder: Path) -> None:
    result = _lineas(model, folder, "--json", "--strength", "0.75", "--license", "CC0-1.0")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    artifact = read_artifact(folder / "tiny-lineas.safetensors")
    assert summary["digest"] == f"sha256:{artifact.digest}"
    assert summary["name"] == artifact.manifest.name == "tiny-lineas"
    assert summary["final_loss"] < summary["initial_loss"]
    manifest = artifact.manifest
    assert isinstance(manifest, AffineManifest)
    assert manifest.method == "lineas"
    assert manifest.license == "CC0-1.0"
    assert manifest.defaults.strength == 0.75
    assert check_compatible(artifact, _load(model).description) == ()
    assert not isinstance(artifact.parameters, RewardHead)
    assert set(artifact.parameters) == set(SITES)
    assert all(map_.weight.shape == (WIDTH,) for map_ in artifact.parameters.values())
    training = manifest.training
    source = (folder / "toxic.txt").read_bytes()
    assert training["source"] == "toxic.txt"
    assert training["source_sha256"] == hashlib.sha256(source).hexdigest()
    expected = {"samples": 3, "steps": 3, "optimizer": "sgd", "seed": 0, "model_dtype": "float32"}
    assert {key: training[key] for key in expected} == expected
    assert training["torch"] == torch.__version__
    assert training["device"] == "cpu"
    # Every client that may list interventions reads the manifest: it holds no path of this machine.
    assert str(folder) not in manifest.model_dump_json()
    assert str(Path(model).parent) not in manifest.model_dump_json()
    assert {"transformers", "initial_loss", "final_loss", "learning_rate"} <= training.keys()


def test_argre_end_to_end(model: str, folder: Path) -> None:
    result = _argre(model, folder, "--eta", "0.25", "--name", "mild", "--description", "softer")
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(folder / "tiny-argre.safetensors")
    assert artifact.digest in result.stdout
    manifest = artifact.manifest
    assert isinstance(manifest, RewardManifest)
    assert (manifest.name, manifest.description) == ("mild", "softer")
    assert (manifest.defaults.eta, manifest.defaults.iterations) == (0.25, 5)
    assert manifest.training["samples"] == 3
    loaded = _load(model)
    assert check_compatible(artifact, loaded.description) == ()
    assert isinstance(artifact.parameters, RewardHead)
    assert artifact.parameters.w1.shape == (16, WIDTH)
    ends = []
    for side in ("positive", "negative"):
        texts = [pair.get("prompt", "") + pair[side] for pair in _PAIRS]
        ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
        states = collect_hidden_states(loaded.model, loaded.lm_head, ids, 1)
        ends.append(torch.stack([rows[-1] for rows in states]))
    expected = (ends[0] - ends[1]).mean(0)
    torch.testing.assert_close(artifact.parameters.direction, expected, atol=1e-4, rtol=1e-4)


def test_a_prompts_tokens_are_not_fitted_on(model: str, folder: Path) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps(_PAIRS[0]))
    assert _argre(model, folder).exit_code == 0
    head = read_artifact(folder / "tiny-argre.safetensors").parameters
    assert isinstance(head, RewardHead)
    loaded = _load(model)
    ids = loaded.tokenizer("you are kind")["input_ids"]
    states = collect_hidden_states(loaded.model, loaded.lm_head, [ids], 1)[0][len("you are ") :]
    rewards = torch.relu(states @ head.w1.T + head.b1) @ head.w2 + head.b2
    torch.testing.assert_close(head.positive_reward, rewards.mean(), atol=1e-5, rtol=1e-4)


def test_a_fixed_date_makes_the_same_bytes(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")
    digests = {json.loads(_lineas(model, folder, "--json").stdout)["digest"] for _ in range(2)}
    assert len(digests) == 1
    created = read_artifact(folder / "tiny-lineas.safetensors").manifest.created
    assert created.isoformat() == "2026-11-21T00:00:00+00:00"


def test_sites_may_be_chosen(model: str, folder: Path) -> None:
    assert _lineas(model, folder, "--sites", r"model\.layers\.1\.mlp").exit_code == 0
    parameters = read_artifact(folder / "tiny-lineas.safetensors").parameters
    assert not isinstance(parameters, RewardHead)
    assert set(parameters) == {"model.layers.1.mlp"}


def test_a_pattern_chooses_outputs_of_modules_only(model: str, folder: Path) -> None:
    assert "model.layers.1.mlp.input" in _load(model).description.site_widths
    assert _lineas(model, folder, "--sites", r"model\.layers\.1\.mlp(\.input)?").exit_code == 0
    parameters = read_artifact(folder / "tiny-lineas.safetensors").parameters
    assert not isinstance(parameters, RewardHead)
    assert set(parameters) == {"model.layers.1.mlp"}
    result = _lineas(model, folder, "--sites", r".*\.input")
    assert result.exit_code == 2
    assert "matches no module" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4"), "4 samples were asked for, the source has 3"),
        (("--sites", "nothing"), "matches no module"),
        (("--sites", "("), "not a regular expression"),
        (("--out", "x.bin"), "must end in .safetensors"),
        (("--out", "/nowhere/x.safetensors"), "/nowhere"),
        (("--out", "Bad Name.safetensors"), "'Bad Name' is not a name"),
        (("--name", "no/slash"), "'no/slash' is not a name"),
        (("--source", "gone.txt"), "gone.txt: No such file"),
        (("--model", "/no/such/model"), "cannot load '/no/such/model'"),
        (("--dtype", "int8"), "dtype must be"),
        (("--learning-rate", "0"), "learning_rate must be a positive number"),
        (("--learning-rate", "1e30", "--steps", "9"), "lower the learning rate"),
        (("--license", " "), "--license"),
        (("--device", "tpu"), "tpu"),
        (("--optimizer", "newton"), "newton"),
        (("--strength", "2"), "strength"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    model: str, folder: Path, options: tuple[str, ...], message: str
) -> None:
    result = _lineas(model, folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / "tiny-lineas.safetensors").exists()


def test_a_default_outside_of_the_limits_is_refused(model: str, folder: Path) -> None:
    result = _argre(model, folder, "--eta", "-3")
    assert result.exit_code == 2
    assert "eta" in result.stderr


def test_a_continuation_beyond_max_tokens_is_refused(model: str, folder: Path) -> None:
    result = _argre(model, folder, "--max-tokens", "4")
    assert result.exit_code == 2
    assert "pair 1: nothing of its positive is left" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"one\n\nthree\n", "x.txt:2: the line is empty"),
        (b"one\n\xff\n", "byte 4 is not UTF-8"),
    ],
)
def test_lines_that_mean_nothing_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(TrainingFileError, match=message):
        read_lines(path)


def test_lines_keep_what_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one \u2028 two\r\n  three\x0c\n".encode())
    assert read_lines(path).lines == ("one \u2028 two", "  three\x0c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:2: not JSON"),
        ("[1]", "x.jsonl:2: a pair is an object"),
        ('{"positive": "a"}', "x.jsonl:2: the field 'negative'"),
        ('{"positive": "", "negative": "b"}', "x.jsonl:2: the field 'positive'"),
        ('{"positive": 1, "negative": "b"}', "x.jsonl:2: the field 'positive'"),
        ('{"positive": "a", "negative": "b", "prompt": 3}', "x.jsonl:2: the field 'prompt'"),
        ('{"positive": "a", "negative": "b", "promt": "c"}', "x.jsonl:2: unknown field 'promt'"),
    ],
)
def test_a_malformed_pair_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(_PAIRS[0]) + "\n" + line + "\n")
    with pytest.raises(TrainingFileError, match=message):
        read_pairs(path)
