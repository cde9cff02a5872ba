"""`steerserve serve`: load the model, open the registry, answer requests."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from server.cli.launch import announce_failure, launch
from server.config import Settings


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
    compile_layers: Annotated[
        bool | None,
        typer.Option(
            "--compile-layers/--no-compile-layers",
            help="On a CPU, compile the model's layers while serving, and what refines rewards "
            "at start; on if unset.",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Keep computed prompts for requests that begin alike; on if unset.",
        ),
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
    toxicity_scorer: Annotated[
        str | None,
        typer.Option(help="embedded (the default), hf:<model>, http:<url> or none."),
    ] = None,
    baseline_sample_rate: Annotated[
        float | None,
        typer.Option(help="Share of steered requests answered unsteered too, to be scored; 0."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text (the default) or json.")] = None,
    log_content: Annotated[
        bool | None,
        typer.Option(
            "--log-content/--no-log-content", help="Log prompts and completions too; not if unset."
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector to send traces to, over HTTP.")
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
        "compile_layers": compile_layers,
        "prefix_cache": prefix_cache,
        "request_timeout": request_timeout,
        "write_timeout": write_timeout,
        "shutdown_timeout": shutdown_timeout,
        "toxicity_scorer": toxicity_scorer,
        "baseline_sample_rate": baseline_sample_rate,
        "log_format": log_format,
        "log_content": log_content,
        "otlp_endpoint": otlp_endpoint,
        "check_invariants": check_invariants,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        announce_failure(error, console)
        raise typer.Exit(1) from error
    if not launch(settings, console):
        raise typer.Exit(1)
