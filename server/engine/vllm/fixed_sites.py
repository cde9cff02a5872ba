"""Says which sites of a model vLLM cannot edit, because it was not prepared for them or at all."""

import re
import shlex
from collections.abc import Collection
from dataclasses import replace

from interventions.model import ModelDescription
from server.engine.vllm.plugin.sites import possible_sites
from steering.sites import locate_site


def with_fixed_sites(model: ModelDescription, prepared: Collection[str]) -> ModelDescription:
    """Return the description of a model of which only the prepared sites can be edited.

    Raises:
        SiteError: the architecture is not steered inside vLLM.
    """
    possible = frozenset(possible_sites(model.architecture, model.num_layers))
    others = [site for site in model.site_widths if site not in prepared]
    return replace(
        model,
        unprepared_sites={site: _option(site) for site in others if site in possible},
        impossible_sites={site: _reason(site) for site in others if site not in possible},
    )


def _option(site: str) -> str:
    """Return the option that prepares a site, and the same site of all other layers."""
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in site.split("."))
    pattern = shlex.quote(r"\.".join(parts))
    return f"--site {pattern}"


def _reason(site: str) -> str:
    module, is_input = locate_site(site)
    if is_input:
        return "vLLM fuses modules, and the input of a module cannot be edited there."
    return f'vLLM fuses modules, and does not compute "{module}" apart as transformers does.'
