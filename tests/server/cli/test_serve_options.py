"""Tests of `steerserve serve`: flags and variables reach the settings, and these the engine."""

from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console
from typer.testing import CliRunner, Result

from server.__main__ import app
from server.cli import launch
from server.cli import serve as command
from server.config import Settings
from server.engine.model.description import ModelLoadError
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.lifecycle import Server
from server.toxicity.pace import Pace
from tests.conftest import LoadTiny

# For every field of `Settings`: the text that is given, and the value that the field then has.
GIVEN: dict[str, tuple[str, object]] = {
    "model": ("other/model", "other/model"),
    "engine": ("vllm", "vllm"),
    "sites": (r"model\.norm .*mlp", (r"model\.norm", ".*mlp")),
    "vllm_args": ("--enforce-eager", "--enforce-eager"),
    "vllm_runner": ("v2", "v2"),
    "chat_template": ("chat.jinja", Path("chat.jinja")),
    "response_template": ("response.json", Path("response.json")),
    "dtype": ("float32", "float32"),
    "device_map": ("auto", "auto"),
    "threads": ("3", 3),
    "served_model_names": ("a b", ("a", "b")),
    "host": ("::1", "::1"),
    "port": ("9", 9),
    "root_path": ("/llm", "/llm"),
    "api_key": ("k", SecretStr("k")),
    "api_key_file": ("api.key", Path("api.key")),
    "admin_key": ("l", SecretStr("l")),
    "admin_key_file": ("admin.key", Path("admin.key")),
    "metrics_key": ("m", SecretStr("m")),
    "metrics_key_file": ("metrics.key", Path("metrics.key")),
    "allowed_hosts": ("a.example b.example", ("a.example", "b.example")),
    "playground": ("on", True),
    "cors_origins": ("http://a:1 http://b", ("http://a:1", "http://b")),
    "registry": ("elsewhere", Path("elsewhere")),
    "max_loaded_interventions": ("4", 4),
    "default_steering": ('{"intervention":"x"}', {"intervention": "x"}),
    "steering_policy": ("required", "required"),
    "max_body_bytes": ("2000", 2000),
    "max_artifact_bytes": ("3000", 3000),
    "max_completions_per_request": ("5", 5),
    "body_timeout": ("0.5", 0.5),
    "min_upload_rate": ("1000", 1000),
    "default_max_tokens": ("50", 50),
    "keep_alive": ("7.5", 7.5),
    "write_timeout": ("2.5", 2.5),
    "request_timeout": ("1.5", 1.5),
    "shutdown_timeout": ("3", 3.0),
    "shutdown_keep_alive": ("2.5", 2.5),
    "toxicity_scorer": ("hf:judge", "hf:judge"),
    "toxicity_queue_size": ("10", 10),
    "toxicity_share": ("1", 1.0),
    "baseline_sample_rate": ("0.25", 0.25),
    "dose_interval": ("0", 0),
    "log_format": ("json", "json"),
    "log_content": ("on", True),
    "otlp_endpoint": ("http://collector:4318", "http://collector:4318"),
    "max_model_len": ("5", 5),
    "max_waiting": ("6", 6),
    "max_batch_size": ("7", 7),
    "max_batch_tokens": ("80", 80),
    "kv_cache_gb": ("0.5", 0.5),
    "attention": ("slabs", "slabs"),
    "cuda_graphs": ("off", False),
    "compile_layers": ("off", False),
    "prefix_cache": ("off", False),
    "check_invariants": ("on", True),
}


KEY_FILES = ("api_key_file", "admin_key_file", "metrics_key_file")


class Launches:
    """Records the settings of each launch, in place of launching a server."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self.end_well = True

    def launch(self, settings: Settings, _: Console) -> bool:
        self.settings.append(settings)
        return self.end_well


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    monkeypatch.setattr(command, "launch", launches.launch)
    return launches


@pytest.fixture(autouse=True)
def key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in a folder that has the key files named in `GIVEN`."""
    monkeypatch.chdir(tmp_path)
    for name in KEY_FILES:
        Path(GIVEN[name][0]).write_text("k\n")


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def as_words(name: str) -> list[str]:
    """Return the command-line words that give the setting its value in `GIVEN`."""
    text, _ = GIVEN[name]
    flag = "--" + name.replace("_", "-")
    match text:
        case "on":
            return [flag]
        case "off":
            return [flag.replace("--", "--no-")]
    if name == "served_model_names":
        return ["--served-model-name", *text.split()]
    if isinstance(GIVEN[name][1], tuple):
        return [word for item in text.split() for word in (flag.removesuffix("s"), item)]
    return [flag, text]


def fields_set_by(name: str) -> set[str]:
    """Return the fields that are set when this one is given: a key's file sets the key too."""
    return {name, name.removesuffix("_file")} if name in KEY_FILES else {name}


def test_every_setting_is_tried() -> None:
    assert GIVEN.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_flag(name: str, launches: Launches) -> None:
    shown = serve(*as_words(name))
    assert shown.exit_code == 0, shown.output
    [settings] = launches.settings
    assert settings.model_fields_set == fields_set_by(name)
    assert getattr(settings, name) == GIVEN[name][1]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_variable_named_as_its_option(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = as_words(name)[0].removeprefix("--no-").removeprefix("--")
    monkeypatch.setenv(f"STEERSERVE_{option.replace('-', '_').upper()}", GIVEN[name][0])
    settings = Settings()
    assert settings.model_fields_set == fields_set_by(name)
    assert getattr(settings, name) == GIVEN[name][1]


@pytest.mark.parametrize("end_well", [True, False])
def test_all_flags_at_once(launches: Launches, end_well: bool) -> None:
    launches.end_well = end_well
    together = [name for name in GIVEN if name not in KEY_FILES]  # a key excludes its file
    shown = serve(*(word for name in together for word in as_words(name)))
    assert shown.exit_code == (0 if end_well else 1), shown.output
    [settings] = launches.settings
    assert {name: getattr(settings, name) for name in together} == {
        name: GIVEN[name][1] for name in together
    }


def test_a_switch_can_be_given_as_it_is_by_default(launches: Launches) -> None:
    assert serve("--cuda-graphs", "--no-check-invariants").exit_code == 0
    [settings] = launches.settings
    assert settings.model_fields_set == {"cuda_graphs", "check_invariants"}
    assert settings.cuda_graphs
    assert not settings.check_invariants


def test_a_flag_that_is_not_given_leaves_the_variable(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("PORT", "9"), ("CUDA_GRAPHS", "off"), ("SERVED_MODEL_NAME", "a")):
        monkeypatch.setenv(f"STEERSERVE_{name}", text)
    assert serve("--host", "::1").exit_code == 0
    [settings] = launches.settings
    assert (settings.host, settings.port, settings.cuda_graphs) == ("::1", 9, False)
    assert settings.served_names == ("a",)


@pytest.mark.parametrize(
    "words",
    [
        ["--served-model-name", "a", "--served-model-name", "b", "--port", "9"],
        ["--served-model-name", "a", "b", "--port", "9"],
        ["--port", "9", "--served-model-name", "a", "b"],
    ],
)
def test_names_may_follow_one_flag_or_one_each(words: list[str], launches: Launches) -> None:
    assert serve(*words).exit_code == 0
    [settings] = launches.settings
    assert (settings.served_names, settings.port) == (("a", "b"), 9)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stray"], "stray"),
        (["--prot", "1"], "--prot"),
        (["--port", "99999"], "--port"),
        (["--port", "x"], "--port"),
        (["--attention", "paged"], "--attention"),
        (["--body-timeout", "0"], "body_timeout"),
        (["--kv-cache-gb", "nan"], "kv_cache_gb"),
        (["--default-steering", "{"], "default_steering"),
        (["--served-model-name", "a", "a"], "served model names"),
        (["--api-key", "k", "--api-key-file", "api.key"], "api_key and api_key_file"),
        (["--admin-key", "k", "--admin-key-file", "admin.key"], "admin_key and admin_key_file"),
        (["--admin-key-file", "nowhere.key"], "nowhere.key, cannot be read: No such file"),
        (["--allowed-host", "a.example", "b.example"], "b.example"),
        (["--allowed-host", "https://a.example"], "is not a host to allow"),
        (["--cors-origin", "https://a.example/"], "is not an origin"),
        (["--cors-origin", "https://a.example", "--cors-origin", "a.example"], "'a.example'"),
        (["--cors-origin", "*"], "needs an API key"),
    ],
)
def test_what_is_refused_is_named(words: list[str], told: str, launches: Launches) -> None:
    shown = serve(*words)
    assert shown.exit_code in (1, 2)
    assert told in shown.output
    assert not launches.settings


def test_a_wrong_variable_is_named(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_PORT", "x")
    shown = serve()
    assert shown.exit_code == 1
    assert shown.output.startswith("steerserve: port: ")
    assert not launches.settings


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("STEERSERVE_STEERING_POLCY", "did you mean STEERSERVE_STEERING_POLICY?"),
        ("STEERSERVE_SERVED_MODEL_NAMES", "did you mean STEERSERVE_SERVED_MODEL_NAME?"),
        ("steerserve_steering_policy", "did you mean STEERSERVE_STEERING_POLICY?"),
        ("STEERSERVE_ADMINKEY", "did you mean STEERSERVE_ADMIN_KEY?"),
        ("STEERSERVE_CACHES", "did you mean STEERSERVE_CACHE?"),
        ("STEERSERVE_QQQ", "docs/options.md lists them"),
    ],
)
def test_a_misspelt_variable_ends_the_start(
    variable: str, told: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "locked")
    shown = serve()
    assert shown.exit_code == 1
    assert variable in shown.output
    assert told in shown.output
    assert not launches.settings


def test_other_commands_do_not_mind_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_STEERING_POLCY", "locked")
    shown = CliRunner().invoke(app, ["list", "--url", "http://127.0.0.1:9"])
    assert "Cannot reach" in shown.output


@pytest.mark.parametrize("given_as", ["flag", "variable"])
def test_a_key_in_a_variable_and_another_in_a_file_contradict_each_other(
    given_as: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERSERVE_API_KEY", "k")
    if given_as == "variable":
        monkeypatch.setenv("STEERSERVE_API_KEY_FILE", "api.key")
    shown = serve(*(["--api-key-file", "api.key"] if given_as == "flag" else []))
    assert shown.exit_code == 1
    assert "api_key and api_key_file are both given" in shown.output
    assert not launches.settings


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_a_wrong_key_is_not_shown(flag: str, launches: Launches) -> None:
    shown = serve(flag, "secret words")
    assert shown.exit_code == 1
    assert flag.strip("-").replace("-", "_") in shown.output
    assert "secret" not in shown.output
    assert not launches.settings


def test_the_help_tells_what_each_is_for_and_its_default() -> None:
    shown = " ".join(serve("--help").output.replace("│", " ").split())
    for name, field in Settings.model_fields.items():
        assert as_words(name)[0] in shown
        assert field.description
        assert " ".join(field.description.split()) in shown, name
    assert "Port to listen on; 0 for any that is free. Default: 8000." in shown
    assert "[0<=x<=65535]" in shown
    assert "automatic|pages|slabs" in shown


@pytest.mark.parametrize(("started", "died"), [(True, False), (True, True), (False, False)])
def test_the_settings_get_to_model_and_engine(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool, died: bool
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
        server.started = started  # False: the application failed to start
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
        attention="slabs",
        cuda_graphs=False,
        max_batch_size=3,
        kv_cache_gb=0.01,
    )
    assert launch.launch(settings, Console(quiet=True)) is (started and not died)
    assert device_maps == ["auto"]
    [options] = engines
    assert (options.check_invariants, options.max_batch_size) == (True, 3)
    assert not options.prefix_cache
    assert not options.compile_layers
    assert (options.attention, options.cuda_graphs) == ("slabs", False)


@pytest.mark.parametrize(
    ("scorer", "rests"), [("embedded", True), ("hf:judge", True), ("http://scorer:1", False)]
)
def test_scoring_rests_only_where_this_machine_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scorer: str, rests: bool
) -> None:
    paces: list[Pace | None] = []

    class Scorer:
        def close(self) -> None:
            pass

    def queue(scorer: object, metrics: object, capacity: int, pace: Pace | None) -> None:
        paces.append(pace)
        raise ModelLoadError("enough is known")

    monkeypatch.setattr(launch, "configure_logging", lambda _: None)
    monkeypatch.setattr(launch, "_load_engine", lambda *_: None)
    monkeypatch.setattr(launch, "ScorerProcess", lambda _: Scorer())
    monkeypatch.setattr(launch, "ScoringQueue", queue)
    settings = Settings(model="tiny", registry=tmp_path, toxicity_scorer=scorer)
    assert not launch.launch(settings, Console(quiet=True))
    assert [pace is not None for pace in paces] == [rests]


def test_the_scorer_is_loaded_before_the_engine_takes_what_memory_is_free(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Scorer:
        def wait_ready(self) -> None:
            happened.append("scorer")

        def close(self) -> None:
            pass

    def start(loaded: LoadedModel, source: object, options: EngineOptions) -> TorchEngine:
        happened.append("engine")
        raise ModelLoadError("enough is known")

    monkeypatch.setattr(launch, "configure_logging", lambda _: None)
    monkeypatch.setattr(launch, "load_model", lambda *_, **__: load_tiny())
    monkeypatch.setattr(launch, "ScorerProcess", lambda _: Scorer())
    monkeypatch.setattr(launch, "TorchEngine", start)
    settings = Settings(model="tiny", registry=tmp_path)
    assert not launch.launch(settings, Console(quiet=True))
    assert happened == ["scorer", "engine"]
