"""lm-evaluation-harness on local tasks; its log-likelihoods are held to Hugging Face's own."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transformers import AutoModelForCausalLM, AutoTokenizer

from interventions.artifact import read_artifact
from interventions.bundled import bundled_artifacts
from server.config import EMBEDDED_MODEL_NAME as MODEL
from server.engine.model.embedded import embedded_model_folder
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
            given = (
                f"model={name},tokenizer={folder},tokenizer_backend=huggingface,num_concurrent=1"
            )
            samples = _samples(python, tasks, "choice", "local-completions", url, given)
            far = _distance(samples, folder, stack)
            result = f"log-likelihoods of {name} within {far:.0e}"
            results[result] = None if far < TOLERANCE else f"more than {TOLERANCE}"
            for kind in ("local-completions", "local-chat-completions"):
                made = _samples(python, tasks, "generation", kind, url, given)
                results[f"{kind} of {name}"] = None if len(made) == len(QUESTIONS) else "too few"
    return results


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


def _samples(
    python: Path, tasks: Path, task: str, kind: str, url: str, given: str
) -> list[dict[str, Any]]:
    """Run a task, and return what the harness logs of each of its questions."""
    is_chat = kind == "local-chat-completions"
    path = "chat/completions" if is_chat else "completions"
    output = Path(tempfile.mkdtemp(dir=tasks))
    command = [
        *(str(python.parent / "lm-eval"), "run", "--model", kind, "--tasks", f"steerserve_{task}"),
        *("--model_args", f"{given},base_url={url}/v1/{path}", "--include_path", str(tasks)),
        *("--log_samples", "--output_path", str(output)),
        *(("--apply_chat_template",) if is_chat else ()),
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


def _stack() -> Stack:
    [path] = [each for each in bundled_artifacts() if STEERED in each.name]
    artifact = read_artifact(path)
    return ((artifact.parameters, AffineSettings(1.0, "all")),)  # its defaults


LM_EVAL: Final = Suite("lm-eval", ("lm-eval[api]==0.4.13", "transformers"), run_lm_eval)
