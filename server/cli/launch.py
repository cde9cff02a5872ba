"""Builds the server from its settings, and runs it."""

import gc
import importlib
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Final

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from prometheus_client import disable_created_metrics
from pydantic import ValidationError
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from interventions.artifact import read_manifest
from interventions.bundled import bundled_artifacts
from interventions.errors import RegistryDiskError, RegistryError, UnknownInterventionError
from interventions.header import ArtifactLimits
from interventions.layout import AffineShapes
from interventions.registry import Registry
from interventions.watch import polling
from server.app import create_app
from server.config import ConfigurationError, Settings
from server.engine.base import Engine
from server.engine.model.description import ModelLoadError
from server.engine.model.embedded import EmbeddedModelError, cache_folder
from server.engine.templates import Templates, TemplatesError
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.engine.vllm.environment import prepare_environment
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.versions import check_version
from server.lifecycle import Server
from server.logs import LogSink, configure_logging
from server.metrics import Metrics
from server.own_thread import in_own_thread
from server.records import ClosableSink, RecordSink
from server.toxicity.pace import Pace
from server.toxicity.process import ScorerProcess
from server.toxicity.queue import ScoringQueue
from server.toxicity.scorer import ScoringError, parse_spec

logger = logging.getLogger(__name__)

_TORCH_ONLY: Final = frozenset(
    {
        "attention",
        "check_invariants",
        "compile_layers",
        "cuda_graphs",
        "device_map",
        "threads",
    }
)
_VLLM_ONLY: Final = frozenset({"sites", "vllm_args", "vllm_runner"})

STARTUP_ERRORS: Final = (
    ConfigurationError,
    EmbeddedModelError,
    ModelLoadError,
    RegistryError,
    ScoringError,
    TemplatesError,
    ValidationError,
)


def launch(settings: Settings, console: Console) -> bool:
    """Serve until a signal; report progress on the console, or in the log if it is JSON.

    Returns:
        False if the server could not be started, or the engine has died.
    """
    json = settings.log_format == "json"
    configure_logging(settings.log_format)
    if json:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series

    def report(sentence: str) -> None:
        if json:
            logger.info("%s", sentence)
        else:
            console.print(f"steerserve: {sentence}", markup=False, soft_wrap=True)

    try:
        return _run(settings, report)
    except STARTUP_ERRORS as error:
        if json:
            logger.critical("%s", _sentence(error))
        else:
            announce_failure(error, console)
        return False


def announce_failure(error: Exception, console: Console) -> None:
    """Say why the server cannot be started."""
    console.print(f"steerserve: {_sentence(error)}", style="red", markup=False, soft_wrap=True)


def _run(settings: Settings, report: Callable[[str], None]) -> bool:
    """Serve until a signal; return whether the server had started and its engine is alive."""
    with ExitStack() as stack:
        sinks: list[RecordSink] = [LogSink(with_content=settings.log_content)]
        if settings.otlp_endpoint is not None:
            traces = load_trace_sink(settings.otlp_endpoint, with_content=settings.log_content)
            stack.callback(traces.close)
            sinks.append(traces)
        scorer = None
        if settings.toxicity_scorer != "none":
            process = ScorerProcess(settings.toxicity_scorer)  # it loads while the model does
            scorer = stack.enter_context(closing(process))
        limits = ArtifactLimits(max_bytes=settings.max_artifact_bytes)
        report(f"opening the registry {settings.registry_path}")
        registry = stack.enter_context(Registry(settings.registry_path, limits))
        if settings.model == "embedded":
            _add_bundled(registry)
        stack.enter_context(polling(registry))
        load = _load_vllm_engine if settings.engine == "vllm" else _load_engine
        _refuse_settings_of_the_other_engine(settings)
        engine = in_own_thread(partial(load, settings, registry, scorer, report)).result()
        metrics = Metrics(engine, registry, settings.served_names[0])
        scoring = None
        if scorer is not None:
            pace = None  # another machine scores at no cost to the engine
            if parse_spec(settings.toxicity_scorer).kind != "http":
                pace = Pace(settings.toxicity_share, lambda: engine.stats().running > 0)
            scoring = ScoringQueue(scorer, metrics, settings.toxicity_queue_size, pace)
        app = create_app(engine, registry, metrics, scoring, settings, sinks)
        names = ", ".join(entry.name for entry in registry.entries()) or "none yet"
        report(f"interventions: {names}")
        if settings.serves_playground:
            report(f"see what they change: {settings.url}/playground")
        server = Server(app)
        # The objects that exist now are hundreds of thousands, and live as long as the process. A
        # garbage collection stops every thread while it visits each object that is not excluded,
        # and a client can cause any number of collections by a body that holds many lists.
        gc.collect()
        gc.freeze()
        server.run()
        return server.started and not server.engine_died


def load_trace_sink(endpoint: str, *, with_content: bool) -> ClosableSink:
    """Make a sink that sends spans to a collector. OpenTelemetry is imported only by this call.

    Args:
        endpoint: the collector's base URL, for OTLP over HTTP.
        with_content: whether spans may carry prompts and completions.

    Raises:
        ConfigurationError: the extra `otel` is not installed, or the endpoint is no such URL.
    """
    try:
        tracing = importlib.import_module("server.tracing")
    except ImportError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigurationError(
            "--otlp-endpoint needs OpenTelemetry, which is not installed: "
            "pip install 'steerserve[otel]'"
        ) from error
    sink: ClosableSink = tracing.open_trace_sink(endpoint, with_content=with_content)
    return sink


def _load_engine(
    settings: Settings,
    registry: Registry,
    scorer: ScorerProcess | None,
    report: Callable[[str], None],
) -> TorchEngine:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _keep_compiled()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(
        settings.model, settings.dtype, device, report, device_map=settings.device_map
    )
    if scorer is not None:
        # A classifier on the same GPU needs its memory first: the engine takes all that is free.
        scorer.wait_ready()
    report(
        f"testing the engine on {loaded.description.architecture}, {loaded.model.dtype}, {device}"
    )
    options = EngineOptions(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_waiting,
        max_model_len=settings.max_model_len,
        kv_cache_gb=settings.kv_cache_gb,
        max_loaded_interventions=settings.max_loaded_interventions,
        attention=settings.attention,
        cuda_graphs=settings.cuda_graphs,
        compile_layers=settings.compile_layers,
        prefix_cache=settings.prefix_cache,
        check_invariants=settings.check_invariants,
        dose_interval=settings.dose_interval,
        templates=_templates(settings),
    )
    return TorchEngine(loaded, lambda digest: registry.load(digest).parameters, options)


def _load_vllm_engine(
    settings: Settings,
    registry: Registry,
    scorer: ScorerProcess | None,
    report: Callable[[str], None],
) -> Engine:
    if warning := check_version():
        report(warning)
    prepare_environment(settings.vllm_runner)
    build = importlib.import_module("server.engine.vllm.build")
    options = VllmOptions(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_waiting,
        max_model_len=settings.max_model_len,
        kv_cache_gb=settings.kv_cache_gb,
        max_loaded_interventions=settings.max_loaded_interventions,
        prefix_cache=settings.prefix_cache,
        dose_interval=settings.dose_interval,
        sites=settings.sites,
        vllm_args=settings.vllm_args,
        runner=settings.vllm_runner,
        templates=_templates(settings),
    )
    if scorer is not None:
        # A classifier on the same GPU needs its memory first: the engine takes all that is free.
        scorer.wait_ready()
    engine: Engine = build.build_engine(
        settings.model, settings.dtype, options, registry.path, _stored_sites(registry), report
    )
    return engine


def _templates(settings: Settings) -> Templates:
    return Templates(settings.chat_template, settings.response_template)


def _stored_sites(registry: Registry) -> frozenset[str]:
    """Return the sites of all stored interventions."""
    sites: set[str] = set()
    for entry in registry.entries():
        with suppress(UnknownInterventionError):  # another server has deleted it just now
            shapes = registry.shapes(entry.digest)
            if isinstance(shapes, AffineShapes):
                sites |= shapes.site_widths.keys()
    return frozenset(sites)


def _refuse_settings_of_the_other_engine(settings: Settings) -> None:
    """Raise ConfigurationError if a setting was given that the chosen engine does not have."""
    others = _VLLM_ONLY if settings.engine == "torch" else _TORCH_ONLY
    if given := sorted(others & settings.model_fields_set):
        raise ConfigurationError(
            f"the engine {settings.engine} does not have the setting {given[0]}"
        )


def _keep_compiled() -> None:
    """Have torch cache compiled code in the user's cache, for the next start, not in /tmp."""
    folder = cache_folder() / "compiled"
    with suppress(OSError):  # with a read-only home, the cache stays in /tmp
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _add_bundled(registry: Registry) -> None:
    """Store the bundled interventions, except those that were stored or deleted before."""
    for path in bundled_artifacts():
        name = read_manifest(path).name
        if not registry.known(name):
            try:
                registry.add(path, name)
            except RegistryDiskError as error:  # stored interventions can be served all the same
                logger.warning("The bundled intervention %s is not stored. %s", name, error)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            if problem["loc"]
            else problem["msg"]
            for problem in error.errors()
        )
    return str(error)
