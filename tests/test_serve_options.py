"""`steerserve serve`: every flag gets to what it is for."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from server.__main__ import app
from server.cli import launch
from server.cli import serve as command
from server.config import Settings
from server.engine.torch.build import EngineOptions
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loader import LoadedModel
from server.lifecycle import Server
from tests.conftest import LoadTiny

OTHERS: dict[str, object] = {
    "model": "other/model",
    "dtype": "float32",
    "device_map": "auto",
    "threads": 3,
    "served_model_names": ("a", "b"),
    "host": "::1",
    "port": 9,
    "registry": Path("elsewhere"),
    "max_loaded_interventions": 4,
    "default_steering": {"intervention": "x"},
    "steering_policy": "required",
    "request_timeout": 1.5,
    "write_timeout": 2.5,
    "shutdown_timeout": 0.0,
    "max_model_len": 5,
    "max_waiting": 6,
    "max_batch_size": 7,
    "max_batch_tokens": 8,
    "kv_cache_gb": 0.5,
    "compile_layers": False,
    "prefix_cache": False,
    "check_invariants": True,
    "toxicity_scorer": "hf:judge",
    "baseline_sample_rate": 0.25,
    "log_format": "json",
    "log_content": True,
    "otlp_endpoint": "http://collector:4318",
}
KEYS = ("api_key", "admin_key")


@pytest.mark.parametrize("ended_well", [True, False])
def test_every_flag_sets_its_setting(monkeypatch: pytest.MonkeyPatch, ended_well: bool) -> None:
    served: list[Settings] = []

    def keep(settings: Settings, _: Console) -> bool:
        served.append(settings)
        return ended_well

    monkeypatch.setattr(command, "launch", keep)
    arguments = [
        *("--model", "other/model", "--engine", "torch", "--dtype", "float32"),
        *("--device-map", "auto", "--threads", "3", "--served-model-name", "a", "b"),
        *("--host", "::1", "--port", "9", "--api-key", "k", "--admin-key", "l"),
        *("--registry", "elsewhere", "--max-loaded-interventions", "4"),
        *("--default-steering", '{"intervention": "x"}', "--steering-policy", "required"),
        *("--request-timeout", "1.5", "--write-timeout", "2.5", "--shutdown-timeout", "0"),
        *("--max-model-len", "5", "--max-waiting", "6", "--max-batch-size", "7"),
        *("--toxicity-scorer", "hf:judge", "--baseline-sample-rate", "0.25"),
        *("--log-format", "json", "--log-content", "--otlp-endpoint", "http://collector:4318"),
        *("--max-batch-tokens", "8", "--kv-cache-gb", "0.5", "--check-invariants"),
        *("--no-compile-layers", "--no-prefix-cache"),
    ]
    shown = CliRunner().invoke(app, ["serve", *arguments])
    assert shown.exit_code == (0 if ended_well else 1), shown.output
    [settings] = served
    assert {name: getattr(settings, name) for name in OTHERS} == OTHERS
    assert [getattr(settings, key).get_secret_value() for key in KEYS] == ["k", "l"]
    flags = {parameter.name for parameter in get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    assert flags - {"engine", "served_model_name", "more_names", *KEYS} <= OTHERS.keys()


@pytest.mark.parametrize("died", [False, True])
def test_the_settings_get_to_model_and_engine(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    device_maps: list[str] = []
    engines: list[EngineOptions] = []

    def load(*_: object, device_map: str) -> LoadedModel:
        device_maps.append(device_map)
        return load_tiny()

    def start(loaded: LoadedModel, source: object, options: EngineOptions) -> TorchEngine:
        engines.append(options)
        return TorchEngine(loaded, lambda _: {}, options)

    def run(server: Server) -> None:
        server.engine_died = died

    monkeypatch.setattr(launch, "configure_logging", lambda _: None)
    monkeypatch.setattr(launch, "load_model", load)
    monkeypatch.setattr(launch, "TorchEngine", start)
    monkeypatch.setattr(Server, "run", run)
    settings = Settings(
        model="tiny",
        toxicity_scorer="none",
        registry=tmp_path,
        device_map="auto",
        compile_layers=False,
        prefix_cache=False,
        check_invariants=True,
        max_batch_size=3,
        kv_cache_gb=0.01,
    )
    assert launch.launch(settings, Console(quiet=True)) is not died
    assert device_maps == ["auto"]
    [options] = engines
    assert (options.check_invariants, options.max_batch_size) == (True, 3)
    assert not options.prefix_cache
    assert not options.compile_layers
