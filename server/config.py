"""The server's settings, resolved once at start: flags, then the environment, then defaults."""

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.environment import Environment
from server.hosts import ANY_ORIGIN, check_host, check_origin, is_loopback
from server.keys import is_key, with_keys_read
from server.toxicity.scorer import parse_spec

MIB = 1024 * 1024
EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"

SteeringJson: TypeAlias = dict[str, JsonValue] | list[dict[str, JsonValue]]
SteeringPolicy: TypeAlias = Literal["optional", "required", "locked"]

_steering_json: TypeAdapter[SteeringJson | None] = TypeAdapter(SteeringJson | None)


def _split_names(value: object) -> object:
    """Split the text of a variable at commas and blanks into names."""
    return tuple(re.split(r"[\s,]+", value.strip())) if isinstance(value, str) else value


def _parse_steering(value: object) -> object:
    """Parse the JSON text of a flag or a variable."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return _steering_json.validate_json(value)
    except ValidationError as error:
        raise ValueError(
            "the default steering must be a JSON object such as "
            '{"intervention": "detox-lineas", "strength": 0.8}, or a list of them'
        ) from error


def _check_key(key: SecretStr | None) -> SecretStr | None:
    if key is not None and not is_key(key.get_secret_value()):
        raise ValueError("a key is one or more printable ASCII characters without blanks")
    return key


# The beginnings of the server's own paths.
_OWN_PATHS: Final = frozenset(
    {
        *("v1", "health", "ready", "metrics", "version", "docs", "openapi.json"),
        *("tokenize", "detokenize", "tokenizer_info"),
    }
)


def _check_root_path(path: str) -> str:
    path = path.rstrip("/")
    if not re.fullmatch(r"(?:/[A-Za-z0-9._~-]+)*", path):
        raise ValueError("a root path is like /llm or /models/llm: letters, digits and -._~")
    if path.split("/")[1:2] and path.split("/")[1] in _OWN_PATHS:
        raise ValueError(f"the server's own paths begin with /{path.split('/')[1]}")
    return path


def _check_scorer(spec: str) -> str:
    parse_spec(spec)
    return spec


Names: TypeAlias = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]
Key: TypeAlias = Annotated[SecretStr | None, AfterValidator(_check_key)]


class ConfigurationError(Exception):
    """The server cannot start with these settings; the message is one sentence that says why."""


class Settings(BaseSettings):
    """The server's settings. A setting that is not given is read from its environment variable.

    Raises:
        pydantic.ValidationError: a value is of the wrong kind, or two contradict each other.
        pydantic_settings.SettingsError: an unknown variable begins with `STEERSERVE_`.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        # Pydantic would show every wrong value, even a key; the validators show the others.
        hide_input_in_errors=True,
        # The string below a field describes it on the command line and in docs/options.md.
        use_attribute_docstrings=True,
    )

    model: str = Field(default="embedded", min_length=1)
    """Model to serve: embedded (a small one that is included), a Hugging Face id, or a folder."""
    engine: Literal["torch", "vllm"] = "torch"
    """Engine that runs the model: torch, the embedded one, or vllm, which must be installed."""
    sites: Names = ()
    """With vllm: regular expressions over module paths, for sites that interventions uploaded later
    may edit; if unset, the model's default sites and those of the stored interventions, which are
    prepared in any case."""
    vllm_args: str = ""
    """With vllm: vLLM's own options, as on its command line, such as
    "--tensor-parallel-size 2"."""
    vllm_runner: Literal["v1", "v2"] = "v1"
    """With vllm: which of vLLM's two model runners is steered; v2, vLLM's default on a GPU, needs
    Triton, and was never run on a GPU with steering, where the self-test at start decides."""
    chat_template: Path | None = None
    """File with a chat template in Jinja; if unset, the model's own."""
    response_template: Path | None = None
    """File with a response template of transformers, as JSON: how the model writes calls of tools,
    and its reasoning; if unset, the model's own, or one that the server knows."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto chooses one that suits the model and the device."""
    device_map: Literal["none", "auto"] = "none"
    """Placement of the model: none for one device, auto to spread it over all GPUs."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads that the model runs on; if unset, torch decides."""
    served_model_names: Names = ()
    """Names that clients may call the model by, the main one first; if unset, the model's own."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 for any that is free."""
    root_path: Annotated[str, AfterValidator(_check_root_path)] = ""
    """Prefix, such as /llm, that a proxy puts before all paths; it may take it off or leave it."""
    api_key: Key = None
    """Key that clients of /v1 must send; if unset, they need none."""
    api_key_file: Path | None = None
    """File that holds the API key, so that the list of processes does not show the key;
    if unset, the key is that of --api-key."""
    admin_key: Key = None
    """Key for upload and delete; if unset, both are allowed only from this machine, and only if the
    server listens on a loopback address, is not behind a proxy, and has no API key."""
    admin_key_file: Path | None = None
    """File that holds the admin key; if unset, the key is that of --admin-key."""
    metrics_key: Key = None
    """Key that readers of /metrics must send; if unset, they need none."""
    metrics_key_file: Path | None = None
    """File that holds the key for /metrics; if unset, the key is that of --metrics-key."""
    allowed_hosts: Annotated[
        Names, AfterValidator(lambda hosts: tuple(map(check_host, hosts)))
    ] = ()
    """Hosts that a request's Host header may name beside localhost and loopback addresses;
    if unset, none if the server listens on a loopback address, and any host otherwise."""
    playground: bool | None = None
    """Page at /playground that shows a steered model beside the base model; if unset, on if the
    server listens on a loopback address, and off otherwise."""
    cors_origins: Annotated[
        Names, AfterValidator(lambda origins: tuple(map(check_origin, origins)))
    ] = ()
    """Origins, such as https://chat.example.org, whose web pages may use the server from a browser;
    * allows all origins and needs an API key; if unset, no other origin may."""

    registry: Path | None = None
    """Folder of the stored interventions; if unset, steerserve/registry in the user's data
    folder."""
    max_loaded_interventions: int = Field(default=64, ge=1)
    """Most interventions that are loaded on the device at once."""
    default_steering: Annotated[SteeringJson | None, NoDecode, BeforeValidator(_parse_steering)] = (
        None
    )
    """Steering, as JSON, of requests that do not choose any; if unset, they are not steered."""
    steering_policy: SteeringPolicy = "optional"
    """Steering that requests may choose: any or none (optional), any that has an effect (required),
    or only the default steering (locked)."""

    max_body_bytes: int = Field(default=4 * MIB, ge=1024)
    """Largest JSON body of a request, in bytes."""
    max_artifact_bytes: int = Field(default=256 * MIB, ge=1024)
    """Largest artifact, in bytes."""
    max_completions_per_request: int = Field(default=128, ge=1)
    """Most completions of one request: prompts times n, and three times as many with compare."""
    body_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds that a client may pause within a request's body, or before the first request of a
    connection."""
    min_upload_rate: int = Field(default=16 * 1024, ge=1)
    """Lowest average rate of an upload, in bytes a second, after a grace time of --body-timeout
    seconds."""
    keep_alive: float = Field(default=65.0, gt=0, allow_inf_nan=False)
    """Seconds that a connection stays open after an answer if no further request comes."""
    write_timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds after which a client that reads nothing of its answer is cut off."""
    default_max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a chat's answer if the request sets no limit; if unset, as many as the context
    has left, as with OpenAI."""
    request_timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds from a request's arrival within which its body must be complete and its last token
    generated."""
    shutdown_timeout: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running and waiting requests may go on after SIGTERM."""
    shutdown_keep_alive: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds that an idle connection stays open after SIGTERM; requests on it are served. Behind a
    proxy, set more than the proxy keeps idle connections."""

    toxicity_scorer: Annotated[str, Field(min_length=1), AfterValidator(_check_scorer)] = "embedded"
    """Scorer of the completions' toxicity: embedded, hf:MODEL, http:URL, python:MODULE:FUNCTION, or
    none."""
    toxicity_queue_size: int = Field(default=1024, ge=1)
    """Most completions that may wait for a score that no client asks for; others are not scored."""
    toxicity_share: float = Field(default=0.03, gt=0, le=1)
    """Share of one processor's time that scores which no client asks for may take while completions
    are generated."""
    baseline_sample_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of steered requests for which the unsteered answer is generated and scored too."""
    dose_interval: int = Field(default=16, ge=0)
    """Number of steered steps for each step in which the size of edits is measured; 0 for never."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log."""
    log_content: bool = False
    """Write prompts and completions to the log and to traces."""
    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """OpenTelemetry collector to send traces to, over HTTP; if unset, there are no traces."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of a prompt and its completion together; if unset, the model's own limit."""
    max_waiting: int = Field(default=256, ge=1)
    """Most completions that may wait while others run; a request for more is refused."""
    max_batch_size: int = Field(default=64, ge=1)
    """Most completions that run at once."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Most tokens that one step computes; at least as many as --max-batch-size."""
    kv_cache_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Gigabytes of the KV cache, the prefix cache included; if unset, 25 % of a CPU's free memory,
    the memory of a single GPU that interventions, the largest step and CUDA graphs leave free, or
    80 % of the free memory of each of several GPUs."""
    attention: Literal["automatic", "pages", "slabs"] = "automatic"
    """Layout of the KV cache: pages, on one GPU, read by a Triton kernel; or slabs, one for each
    sequence, on any device; automatic takes pages if the GPU and the model are suited to them."""
    cuda_graphs: bool = True
    """Replay steps that only decode as CUDA graphs, on a GPU whose KV cache is in pages."""
    compile_layers: bool = True
    """On a CPU, compile the layers in the background."""
    prefix_cache: bool = True
    """Keep the keys and values of prompts for later requests that begin with equal tokens."""
    check_invariants: bool = False
    """Check the engine's bookkeeping after every step; slow."""

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, given: object) -> object:
        """Read the keys that are given in files, so that other code only sees the key fields."""
        return with_keys_read(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        if self.steering_policy == "locked" and not self.default_steering:
            raise ValueError(
                "the steering policy `locked` needs a default steering: without one every "
                "request would be refused"
            )
        if ANY_ORIGIN in self.cors_origins and self.api_key is None:
            raise ValueError(
                "the CORS origin `*` needs an API key: without one, every page that anybody on "
                "this machine opens could use the server; name the origins, or set a key"
            )
        if self.baseline_sample_rate and self.toxicity_scorer == "none":
            raise ValueError(
                "the baseline sample rate needs a toxicity scorer: unsteered answers are generated "
                "to be scored"
            )
        if self.shutdown_keep_alive and self.shutdown_keep_alive >= self.shutdown_timeout:
            raise ValueError(
                f"shutdown_keep_alive ({self.shutdown_keep_alive:g} s) must be less than "
                f"shutdown_timeout ({self.shutdown_timeout:g} s), as a request that comes on an "
                "idle connection has to end by then"
            )
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_size "
                f"({self.max_batch_size}), so that every running request can take its turn"
            )
        if len(set(self.served_names)) < len(self.served_names):
            raise ValueError("the served model names repeat one")
        for name in self.served_names:
            if not re.fullmatch(r"[^\s+\x00-\x1f]+", name):
                raise ValueError(
                    f"the served model name {name!r} is empty or has a blank or a '+' in it "
                    "('+' separates a model from an intervention); give another with "
                    "--served-model-name"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the given values, then the environment; read no files."""
        return init_settings, Environment(settings_cls)

    @cached_property
    def served_names(self) -> tuple[str, ...]:
        """The names that a request may give as its model, the first being the main one."""
        if self.served_model_names:
            return self.served_model_names
        if self.model == "embedded":
            return (EMBEDDED_MODEL_NAME,)
        folder = Path(self.model).expanduser()
        return (folder.resolve().name,) if folder.is_dir() else (self.model,)

    @cached_property
    def registry_path(self) -> Path:
        """The registry's folder: the given one, or one in the user's data folder."""
        if self.registry is not None:
            return self.registry.expanduser()
        data_home = os.environ.get("XDG_DATA_HOME", "")
        # The XDG specification says that a relative path is to be ignored.
        base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local/share"
        return base / "steerserve" / "registry"

    @property
    def binds_loopback(self) -> bool:
        """True if the server listens on a loopback address, which only this machine reaches."""
        return is_loopback(self.host.strip("[]"))

    @property
    def url(self) -> str:
        """The server's own address, past any proxy."""
        host = self.host.strip("[]")
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def serves_playground(self) -> bool:
        """True if there is a page at /playground."""
        return self.binds_loopback if self.playground is None else self.playground
