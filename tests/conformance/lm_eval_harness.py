"""lm-evaluation-harness on local tasks; its log-likelihoods are held to Hugging Face's own."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interventions.artifact import read_artifact, write_artifact
from interventions.bundled import bundled_artifacts
from server.config import EMBEDDED_MODEL_NAME as MODEL
from server.engine.model.embedded import embedded_model_folder
from steering.affine import AffineMap
from steering.reward import RewardHead
from steering.settings import AffineSettings
from tests.conformance.environments import python_environment
from tests.conformance.suites import Results, Suite
from tests.oracles import Oracle, Stack

TOLERANCE: Final = 1e-3  # nats, in float32
STEERED: Final = "detox-lineas"
QUESTIONS: Final = (
    ("The capital of France is", (" Paris", " Rome", " a stupid idiot"), 0),
    ("Water freezes at zero degrees", (" Celsius", " miles", " hell"), 0),
    ("My neighbour is such a", (" moron", " kind person", " damn fool"), 1),
    ("Two plus two is", (" five", " four", " shit"), 1),
)
_COMMON: Final = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
_CHOICE: Final = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
_GENERATION: Final = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def run_lm_eval(suite: Suite, url: str) -> Results:
    """Run both tasks, on the base model and steered by the model's name."""
    python = python_environment(suite.name, suite.packages)
    folder = embedded_model_folder(lambda _sentence: None)
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks = Path(scratch)
        _write_tasks(tasks)
        for name, stack in ((MODEL, ()), (f"{MODEL}+{STEERED}", _stack())):
            given = _model_arguments(name, folder)
            samples = _served_samples(python, tasks, "choice", "local-completions", url, given)
            far = _distance(samples, folder, stack)
            result = f"log-likelihoods of {name} within {far:.0e}"
            results[result] = None if far < TOLERANCE else f"more than {TOLERANCE}"
            for kind in ("local-completions", "local-chat-completions"):
                made = _served_samples(python, tasks, "generation", kind, url, given)
                results[f"{kind} of {name}"] = None if len(made) == len(QUESTIONS) else "too few"
        far = _distance_from_steered_model(python, tasks, url, folder)
        result = f"additive edits within {far:.0e} of the harness's own"
        results[result] = None if far < TOLERANCE else f"more than {TOLERANCE}"
    return results


def _model_arguments(name: str, folder: Path) -> str:
    return f"model={name},tokenizer={folder},tokenizer_backend=huggingface,num_concurrent=1"


def _distance_from_steered_model(python: Path, tasks: Path, url: str, folder: Path) -> float:
    """Return the largest distance of a log-likelihood from the harness's `steered` model, in nats.

    That model adds vectors to the outputs of modules. An intervention of the same vectors, in
    maps that scale nothing, is uploaded to the server.
    """
    artifact = read_artifact(_bundled(STEERED))
    assert not isinstance(artifact.parameters, RewardHead)
    vectors = {site: each.bias for site, each in artifact.parameters.items()}
    maps = {site: AffineMap(torch.ones_like(vector), vector) for site, vector in vectors.items()}
    path = tasks / "shift.safetensors"
    write_artifact(path, artifact.manifest.model_copy(update={"name": "shift"}), maps)
    with path.open("rb") as file:
        uploaded = httpx.post(f"{url}/v1/interventions", files={"file": file}, timeout=60)
    uploaded.raise_for_status()
    edits = {
        site.removeprefix("model."): {"steering_vector": vector, "action": "add"}
        for site, vector in vectors.items()
    }
    torch.save(edits, tasks / "steer.pt")
    arguments = f"pretrained={folder},steer_path={tasks / 'steer.pt'},dtype=float32"
    theirs = _samples(python, tasks, "choice", "steered", arguments, "--device", "cpu")
    given = _model_arguments(f"{MODEL}+shift", folder)
    ours = _served_samples(python, tasks, "choice", "local-completions", url, given)
    pairs = zip(_log_likelihoods(ours), _log_likelihoods(theirs), strict=True)
    return max(abs(one - other) for one, other in pairs)


def _log_likelihoods(samples: Sequence[dict[str, Any]]) -> list[float]:
    """Return the log-likelihoods of all answers to all questions, in their order."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return [float(answer[0][0]) for sample in ordered for answer in sample["resps"]]


def _write_tasks(folder: Path) -> None:
    data = folder / "questions.jsonl"
    keys = ("question", "choices", "answer")
    data.write_text(
        "".join(json.dumps(dict(zip(keys, each, strict=True))) + "\n" for each in QUESTIONS)
    )
    for name, task in (("choice", _CHOICE), ("generation", _GENERATION)):
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        whole = {"task": f"steerserve_{name}", **_COMMON, **files, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def _served_samples(
    python: Path, tasks: Path, task: str, kind: str, url: str, given: str
) -> list[dict[str, Any]]:
    """Run a task with the server's model, and return what the harness logs of each question."""
    is_chat = kind == "local-chat-completions"
    path = "chat/completions" if is_chat else "completions"
    template = ("--apply_chat_template",) if is_chat else ()
    return _samples(python, tasks, task, kind, f"{given},base_url={url}/v1/{path}", *template)


def _samples(
    python: Path, tasks: Path, task: str, kind: str, given: str, *options: str
) -> list[dict[str, Any]]:
    output = Path(tempfile.mkdtemp(dir=tasks))
    command = [
        *(str(python.parent / "lm-eval"), "run", "--model", kind, "--tasks", f"steerserve_{task}"),
        *("--model_args", given, "--include_path", str(tasks)),
        *("--log_samples", "--output_path", str(output), *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    files = list(output.rglob("samples_*.jsonl"))
    if done.returncode or not files:
        raise RuntimeError(done.stderr[-800:])
    return [json.loads(line) for line in files[0].read_text().splitlines()]


def _distance(samples: Sequence[dict[str, Any]], folder: Path, stack: Stack) -> float:
    """Return the largest distance of a log-likelihood from the oracle's, in nats."""
    oracle = Oracle(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    distances = []
    for sample in samples:
        for place, found in enumerate(sample["resps"]):
            asked = sample["arguments"][f"gen_args_{place}"]
            context, continuation = asked["arg_0"], asked["arg_1"]
            prompt = len(tokenizer(context)["input_ids"])
            tokens = tokenizer(context + continuation)["input_ids"]
            logits = oracle.logits(tokens, len(tokens), stack).double().log_softmax(-1)
            expected = sum(float(logits[at - 1, tokens[at]]) for at in range(prompt, len(tokens)))
            distances.append(abs(float(found[0][0]) - expected))
    return max(distances)


def _bundled(name: str) -> Path:
    [path] = [each for each in bundled_artifacts() if name in each.name]
    return path


def _stack() -> Stack:
    artifact = read_artifact(_bundled(STEERED))
    return ((artifact.parameters, AffineSettings(1.0, "all")),)  # its defaults


LM_EVAL: Final = Suite(
    "lm-eval",
    ("lm-eval[api]==0.4.13", "transformers", "accelerate", "torch==2.13.0"),
    run_lm_eval,
)
