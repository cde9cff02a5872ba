"""`steerserve serve`: load the model, open the registry, answer requests."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console

from interventions.artifact import read_manifest
from interventions.bundled import bundled_artifacts
from interventions.header import ArtifactLimits
from interventions.registry import Registry, RegistryError
from server.app import check_default_steering, create_app
from server.config import ConfigurationError, Settings
from server.engine.torch.build import EngineOptions
from server.engine.torch.embedded import EmbeddedModelError
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loader import ModelLoadError, load_model
from server.lifecycle import Server
from server.metrics import Metrics

_STARTUP_ERRORS = (
    ConfigurationError,
    EmbeddedModelError,
    ModelLoadError,
    RegistryError,
    ValidationError,
)


def serve(
    model: Annotated[
        str | None, typer.Option(help="embedded (the default), a Hugging Face id or a folder.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="torch (the default).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the default), float32, bfloat16 or float16.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="none (the default), or auto: place the model over all devices."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch decides if unset.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1 if unset.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000 if unset.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Folder of the interventions; in the user's data if unset.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that clients must send.")] = None,
    admin_key: Annotated[str | None, typer.Option(help="Key for upload and delete.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model.", metavar="NAME...")
    ] = None,
    more_names: Annotated[
        list[str] | None, typer.Argument(help="Further names, after --served-model-name.")
    ] = None,
    default_steering: Annotated[
        str | None, typer.Option(help="Steering (JSON) of requests that ask for none.")
    ] = None,
    steering_policy: Annotated[
        str | None, typer.Option(help="optional (the default), required or locked.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and completion, in tokens.")
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for keys and values; if unset, 25 % of what is free (80 % on a GPU)."
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Requests running at once; 64.")
    ] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one step; 512.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests waiting at most; 256.")] = None,
    max_loaded_interventions: Annotated[
        int | None, typer.Option(help="Interventions on the device at once; 64.")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds from a request's arrival to its last token; 600.")
    ] = None,
    write_timeout: Annotated[
        float | None, typer.Option(help="Seconds a client may read nothing of its answer; 60.")
    ] = None,
    shutdown_timeout: Annotated[
        float | None, typer.Option(help="Seconds requests may go on after SIGTERM; 30.")
    ] = None,
    check_invariants: Annotated[
        bool | None,
        typer.Option(
            "--check-invariants/--no-check-invariants",
            help="Check the engine's bookkeeping after every step; slow. Off by default.",
        ),
    ] = None,
) -> None:
    """Serve a model with the registry's interventions.

    Every option can be set by a variable too: STEERSERVE_PORT for --port, and so on.
    """
    console = Console(stderr=True, highlight=False)
    if more_names and not served_model_name:
        raise typer.BadParameter(f"unexpected argument {more_names[0]!r}")
    options = {
        "model": model,
        "engine": engine,
        "dtype": dtype,
        "device_map": device_map,
        "threads": threads,
        "host": host,
        "port": port,
        "registry": registry,
        "api_key": api_key,
        "admin_key": admin_key,
        "served_model_names": (*(served_model_name or ()), *(more_names or ())) or None,
        "default_steering": default_steering,
        "steering_policy": steering_policy,
        "max_model_len": max_model_len,
        "kv_cache_gb": kv_cache_gb,
        "max_batch_size": max_batch_size,
        "max_batch_tokens": max_batch_tokens,
        "max_waiting": max_waiting,
        "max_loaded_interventions": max_loaded_interventions,
        "request_timeout": request_timeout,
        "write_timeout": write_timeout,
        "shutdown_timeout": shutdown_timeout,
        "check_invariants": check_invariants,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        _serve(Settings.model_validate(given), console)
    except _STARTUP_ERRORS as error:
        console.print(f"steerserve: {_sentence(error)}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _serve(settings: Settings, console: Console) -> None:
    def say(sentence: str) -> None:
        console.print(f"steerserve: {sentence}", markup=False, soft_wrap=True)

    with ExitStack() as stack:
        limits = ArtifactLimits(max_bytes=settings.max_artifact_bytes)
        say(f"opening the registry {settings.registry_path}")
        registry = stack.enter_context(Registry(settings.registry_path, limits))
        if settings.model == "embedded":
            _add_bundled(registry)
        engine = _load_engine(settings, registry, say)
        app = create_app(engine, registry, Metrics(engine, registry), settings)
        check_default_steering(app.state.context)
        names = ", ".join(entry.name for entry in registry.entries()) or "none yet"
        say(f"interventions: {names}")
        server = Server(app)
        server.run()
        if server.engine_died:
            raise typer.Exit(1)


def _load_engine(settings: Settings, registry: Registry, say: Callable[[str], None]) -> TorchEngine:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(settings.model, settings.dtype, device, say, device_map=settings.device_map)
    say(f"testing the engine on {loaded.description.architecture}, {loaded.model.dtype}, {device}")
    options = EngineOptions(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_waiting,
        max_model_len=settings.max_model_len,
        kv_cache_gb=settings.kv_cache_gb,
        max_loaded_interventions=settings.max_loaded_interventions,
        check_invariants=settings.check_invariants,
    )
    return TorchEngine(loaded, lambda digest: registry.load(digest).parameters, options)


def _add_bundled(registry: Registry) -> None:
    """Store the bundled interventions, but for those that were ever stored, or deleted, before."""
    for path in bundled_artifacts():
        name = read_manifest(path).name
        if not registry.known(name):
            registry.add(path, name)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            if problem["loc"]
            else problem["msg"]
            for problem in error.errors()
        )
    return str(error)
