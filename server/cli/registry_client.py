"""`steerserve push`, `list`, `show` and `delete` work on the registry of a running server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Final, NoReturn, TypeAlias
from urllib.parse import quote

import httpx
import typer
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from interventions.importers.recognise import import_command
from server.variables import URL

DEFAULT_URL: Final = "http://127.0.0.1:8000"
# A large artifact takes a while to send, and the server takes a while to check and store it.
TIMEOUT: Final = httpx.Timeout(10.0, read=300.0, write=300.0)

Url: TypeAlias = Annotated[str, typer.Option(help="The server's address.", envvar=URL.name)]


def _header_value(key: str | None) -> str | None:
    """Refuse a key that no HTTP header can hold.

    Raises:
        BadParameter: it has a character that is not ASCII, or a control character.
    """
    if key is not None and not (key.isascii() and key.isprintable()):
        raise typer.BadParameter("the key may have printable ASCII characters only")
    return key


AdminKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The server's admin key.", envvar="STEERSERVE_ADMIN_KEY", callback=_header_value
    ),
]
ApiKey: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The server's API key.", envvar="STEERSERVE_API_KEY", callback=_header_value),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Name: TypeAlias = Annotated[str, typer.Argument(help="The intervention's name.")]

Json: TypeAlias = dict[str, JsonValue]

# Commands that change the registry send the admin key if one is given, others the API key.

app = typer.Typer(no_args_is_help=True, help="Manage the interventions of a running server.")


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="The artifact, a .safetensors file.")],
    name: Annotated[
        str | None, typer.Option(help="Name to store it under, instead of the one in its manifest.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload an artifact to a running server."""
    fields = {} if name is None else {"name": name}
    console = Console(stderr=True)
    command = import_command(path)
    if command is not None:
        _fail(
            f"{path} is another project's, and no artifact yet. Make one of it: steerserve import "
            f"{command} --model MODEL --out X.safetensors"
            f"{' (of Lin-AcT: ml-act)' if command.startswith('ml-lineas') else ''}"
        )
    try:
        file = path.open("rb")
    except OSError as error:
        _fail(f"Cannot read {path}: {error.strerror}")
    with file, console.status(f"Uploading {path.name} to {url}"):
        answer, status = _call(
            url,
            admin_key or api_key,
            "POST",
            "/v1/interventions",
            files={"file": (path.name, file)},
            fields=fields,
        )
    if as_json:
        _print_json(answer)
        return
    done = "Stored" if status == httpx.codes.CREATED else "Already stored"
    typer.echo(f"{done} {answer['name']} ({answer['method']}, sha256:{answer['digest']})")
    warnings = answer["warnings"]
    for warning in warnings if isinstance(warnings, list) else []:
        typer.echo(f"Warning: {warning}", err=True)
    if not answer["servable"]:
        typer.echo(f"It cannot be served: {answer['reason']}", err=True)


@app.command("list")
def list_interventions(
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the interventions of a running server."""
    answer, _ = _call(url, api_key or admin_key, "GET", "/v1/interventions")
    if as_json:
        _print_json(answer)
        return
    table = Table(box=None)
    for column in ("name", "kind", "method", "defaults", "digest", "servable"):
        table.add_column(column, overflow="fold")
    data = answer["data"]
    for item in data if isinstance(data, list) else []:
        assert isinstance(item, dict)
        table.add_row(
            *(_shown(item[field]) for field in ("name", "kind", "method", "defaults")),
            _shown(item["digest"])[:12],
            "yes" if item["servable"] else f"no: {item['reason']}",
        )
    _print(table)


@app.command()
def show(
    name: Name,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show one intervention of a running server, with its history."""
    answer, _ = _call(url, api_key or admin_key, "GET", _path(name))
    if as_json:
        _print_json(answer)
        return
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for field, value in answer.items():
        if field not in ("object", "history"):
            table.add_row(field, _shown(value))
    history = answer["history"]
    for version in history if isinstance(history, list) else []:
        assert isinstance(version, dict)
        table.add_row(f"{version['event']}", f"{version['at']}  {version['digest'] or ''}")
    _print(table)


@app.command()
def delete(
    name: Name,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a name, and the artifact if nothing else needs it, from a running server."""
    answer, _ = _call(url, admin_key or api_key, "DELETE", _path(name))
    if as_json:
        _print_json(answer)
    else:
        typer.echo(f"Deleted {name}")


def _path(name: str) -> str:
    # A slash is escaped too, so that no name leads to another route.
    return f"/v1/interventions/{quote(name, safe='')}"


def _call(
    url: str,
    key: str | None,
    method: str,
    path: str,
    files: Mapping[str, tuple[str, IO[bytes]]] | None = None,
    fields: Mapping[str, str] | None = None,
) -> tuple[Json, int]:
    """Return the server's answer and its status; an error ends the command with one line."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT) as client:
            response = client.request(method, path, files=files, data=fields)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"Cannot reach {url}: {error or type(error).__name__}")
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        _fail(f"{url} does not answer as a steerserve server (HTTP {response.status_code})")
    if response.is_error:
        problem = answer.get("error")
        message = problem.get("message") if isinstance(problem, dict) else response.reason_phrase
        _fail(f"{message} (HTTP {response.status_code})")
    return answer, response.status_code


def _shown(value: JsonValue) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(item) for item in value) or "-"
    return "-" if value in (None, "") else str(value)


def _print(table: Table) -> None:
    # A manifest's text must not be taken for markup.
    Console(markup=False, emoji=False, highlight=False).print(table)


def _print_json(value: Json) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)
