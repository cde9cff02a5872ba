"""Lists the environment variables that are no settings, and refuses unknown variables.

This module imports hardly more than the standard library, because scoring workers import it.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from interventions.spelling import LONGEST_NAME, nearest_name

PREFIX: Final = "STEERSERVE_"
_LEAST_LIKENESS: Final = 0.5  # of a suggested name to the given one; 1 means equal

# Kubernetes sets these in every container beside a service named "steerserve" or "steerserve-…".
_KUBERNETES_NAME: Final = re.compile(
    r"STEERSERVE_(\w+_)?"
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_PORT: Final = re.compile(r"STEERSERVE_(\w+_)?PORT")
_KUBERNETES_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://.*")


class UnknownVariableError(ValueError):
    """An unknown variable begins with `STEERSERVE_`; the message names the nearest known one."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of steerserve that is no setting of `steerserve serve`."""

    name: str
    description: str

    def read(self) -> str | None:
        """Return the variable's value, or None if it is missing or empty."""
        return read_variable(self.name)


CACHE: Final = Variable(
    "STEERSERVE_CACHE",
    "Folder of the converted embedded model and of compiled code; if unset, steerserve in the "
    "user's cache.",
)
URL: Final = Variable(
    "STEERSERVE_URL",
    "Address of the server that push, list, show, delete, evaluate and bench talk to.",
)
ADMIN_KEY_PATH: Final = Variable(
    "STEERSERVE_ADMIN_KEY_PATH",
    "File that docker/with-admin-key.sh keeps the admin key in; if unset, /data/admin-key.",
)
WORKER_SPEC: Final = Variable(
    "STEERSERVE_WORKER_SPEC", "Scorer that a scoring worker loads; set by the server itself."
)
WORKER_PARENT: Final = Variable(
    "STEERSERVE_WORKER_PARENT", "Process that a scoring worker ends with; set by the server itself."
)
TEST_ALL: Final = Variable(
    "STEERSERVE_TEST_ALL",
    "If set, tests fail if a program that they need is missing; else they are skipped.",
)
TEST_DEATH: Final = Variable(
    "STEERSERVE_TEST_DEATH", "File that ends the engine of the tests' own server when it appears."
)
DRY_RUN: Final = Variable(
    "STEERSERVE_DRY_RUN", "If 1, the tests for a GPU run on the CPU of a machine without a GPU."
)
OTHER_VARIABLES: Final = (
    *(CACHE, URL, ADMIN_KEY_PATH, WORKER_SPEC, WORKER_PARENT),
    *(TEST_ALL, TEST_DEATH, DRY_RUN),
)


def read_variable(name: str) -> str | None:
    """Return a variable's value, or None if it is missing, empty, or set by Kubernetes."""
    value = os.environ.get(name)
    return None if not value or is_set_by_kubernetes(name, value) else value


def is_set_by_kubernetes(name: str, value: str) -> bool:
    """Tell whether Kubernetes has set a variable for a service named steerserve."""
    if _KUBERNETES_NAME.fullmatch(name):
        return True
    # `STEERSERVE_PORT=9000` is a setting; Kubernetes sets the same name to an address.
    return bool(_KUBERNETES_PORT.fullmatch(name) and _KUBERNETES_ADDRESS.fullmatch(value))


def refuse_unknown(environment: Mapping[str, str], settings: Collection[str]) -> None:
    """Refuse an environment with an unknown variable that begins with `STEERSERVE_`.

    An empty variable counts as not set. Names are in capitals; a name in other letters is unknown.

    Args:
        environment: the variables by their names.
        settings: the names of the settings' variables.

    Raises:
        UnknownVariableError: there is such a variable.
    """
    known = {*settings, *(variable.name for variable in OTHER_VARIABLES)}
    unknown = sorted(
        name
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
        and value
        and name not in known
        and not is_set_by_kubernetes(name, value)
    )
    if unknown:
        raise UnknownVariableError("; ".join(_explain(name, known) for name in unknown[:5]))


def _explain(name: str, known: Collection[str]) -> str:
    sentence = f"the environment variable {name[:LONGEST_NAME]} is none of steerserve's"
    # Names are compared without their common prefix, which would make any two of them similar.
    words = {candidate.removeprefix(PREFIX): candidate for candidate in known}
    given = name.upper().removeprefix(PREFIX)
    nearest = nearest_name(given, words, _LEAST_LIKENESS)
    hint = f"did you mean {words[nearest]}?" if nearest else "docs/options.md lists them"
    return f"{sentence}: {hint}"
