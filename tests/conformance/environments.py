"""Makes the environments that clients run in: one for each set of versions, in a cache."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from server.engine.model.embedded import cache_folder


def python_environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of a virtual environment that has the packages."""
    folder = _folder(name, requirements)
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
        (folder / "complete").touch()
    return python


def node_environment(packages: Sequence[str], scripts: Path) -> Path:
    """Return a folder that has the packages of npm, and the scripts."""
    folder = _folder("node", packages)
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
        subprocess.run([*install, *packages], cwd=folder, check=True)
        (folder / "complete").touch()
    for script in scripts.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


def source_of(package: str, version: str) -> Path:
    """Return the folder of a package's source distribution from PyPI."""
    folder = _folder(f"{package}-source", [version])
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        only = ["--no-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
        subprocess.run([*download, *only], check=True)
        shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder)
        (folder / "complete").touch()
    return folder / f"{package}-{version}"


def _folder(name: str, contents: Sequence[str]) -> Path:
    key = hashlib.sha256(json.dumps([sys.version, *contents]).encode()).hexdigest()[:12]
    return cache_folder() / "conformance" / f"{name}-{key}"
