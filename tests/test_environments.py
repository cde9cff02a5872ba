"""Tests that scripts that make a virtual environment say in a sentence why they cannot."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "constraints"
VLLM = SCRIPTS / "vllm_environment.sh"
JUDGE = SCRIPTS / "judge_environment.sh"

without_gpu = pytest.mark.skipif(
    Path("/dev/nvidiactl").exists(), reason="where there is a GPU, another build is installed"
)
# Makes an "environment" whose Python installs nothing.
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\necho "no such package" >&2; exit 1\\n' > "$3/bin/python"
    chmod +x "$3/bin/python"
fi
"""


def run(script: Path, folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run a script with an empty cache, and some programs replaced."""
    replaced = folder / "bin"
    replaced.mkdir()
    for name, text in programs.items():
        (replaced / name).write_text(text)
        (replaced / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{replaced}:{os.environ['PATH']}",
        "PYTHON": "python3",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.run(
        [str(script)], env=variables, capture_output=True, text=True, timeout=60, check=False
    )


@without_gpu
@pytest.mark.parametrize(
    "replaced",
    [
        {"uname": "#!/bin/sh\necho aarch64\n"},
        {"uname": "#!/bin/sh\necho x86_64\n", "grep": "#!/bin/sh\nexit 1\n"},
    ],
    ids=["another processor", "no AVX2"],
)
def test_a_machine_that_cannot_run_vllm_is_told_so(
    tmp_path: Path, replaced: dict[str, str]
) -> None:
    done = run(VLLM, tmp_path, **replaced)
    assert (done.returncode, done.stdout) == (1, "")
    [sentence] = done.stderr.splitlines()
    assert "needs an x86-64 processor with AVX2" in sentence


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        pytest.param(VLLM, "vLLM (cpu) cannot be installed", marks=without_gpu),
        (JUDGE, "toxic-comment-classifier cannot be installed"),
    ],
    ids=["vllm", "judge"],
)
def test_packages_that_cannot_be_had_leave_no_environment(
    tmp_path: Path, script: Path, sentence: str
) -> None:
    programs = {"python3": PYTHON, "uname": "#!/bin/sh\necho x86_64\n", "grep": "#!/bin/sh\n"}
    done = run(script, tmp_path, **programs)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such package" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"steerserve: {sentence}")
    assert not list(tmp_path.rglob("complete"))
