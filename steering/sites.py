"""Names sites, and lists the default sites of affine maps by architecture.

A site is a module's output, or its input (its first argument). An output is named by the module's
Hugging Face path, an input by the path and `.input`.

The default sites are a table: architecture -> regular expression over module paths. They follow the
LinEAS authors: one or two layer norms in each block, depending on the model family. Fitting also
takes any other regular expression; an artifact lists its sites one by one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

INPUT: Final = "input"


class SiteLocation(NamedTuple):
    """A site's location in a model: a module, and its output or its input."""

    module: str  # path
    is_input: bool  # True: the module's first argument; False: its output


def locate_site(site: str) -> SiteLocation:
    """Return a site's location: the site "a.b" is the output of a.b, "a.b.input" its input."""
    module, _, last = site.rpartition(".")
    return SiteLocation(module, True) if last == INPUT else SiteLocation(site, False)


def input_site(module: str) -> str:
    """Return the name of the site that is a module's input."""
    return f"{module}.{INPUT}" if module else INPUT


class SiteError(ValueError):
    """A pattern or an architecture gives no sites; the message says why."""


class UnknownArchitectureError(SiteError):
    """The table has no default sites for this architecture."""


@dataclass(frozen=True, slots=True)
class FamilySites:
    """The default sites of one family of architectures."""

    architectures: tuple[str, ...]  # class names, as in a model's `config.architectures`
    pattern: str  # matched against the whole Hugging Face module path
    meaning: str


DEFAULT_SITES: tuple[FamilySites, ...] = (
    FamilySites(
        architectures=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        ),
        pattern=r"model\.layers\.\d+\.post_attention_layernorm",
        meaning="the input of each block's feed-forward network, after its norm",
    ),
    FamilySites(
        architectures=("Gemma2ForCausalLM",),
        pattern=r"model\.layers\.\d+\.(post_attention_layernorm|post_feedforward_layernorm)",
        meaning="what each block's attention and feed-forward network add to the residual stream",
    ),
    FamilySites(
        architectures=("GPT2LMHeadModel",),
        pattern=r"transformer\.h\.\d+\.(ln_1|ln_2)",
        meaning="the inputs of each block's attention and feed-forward network, after their norms",
    ),
    FamilySites(
        architectures=("OPTForCausalLM",),
        pattern=r"model\.decoder\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm)",
        meaning="the outputs of each block's two layer norms",
    ),
)


def default_sites(architecture: str) -> str:
    """Return the pattern of an architecture's default sites.

    Args:
        architecture: the model's class name, e.g. "LlamaForCausalLM".

    Raises:
        UnknownArchitectureError: the table has no such architecture; the message lists all it has.
    """
    for family in DEFAULT_SITES:
        if architecture in family.architectures:
            return family.pattern
    known = ", ".join(sorted(name for family in DEFAULT_SITES for name in family.architectures))
    raise UnknownArchitectureError(
        f"no default sites are known for {architecture}: give a regular expression over its module "
        f"paths (defaults exist for {known})"
    )


def match_sites(pattern: str, module_paths: Iterable[str]) -> tuple[str, ...]:
    """Return the module paths that a pattern matches as a whole, layer 2 before layer 10.

    Raises:
        SiteError: the pattern is not a regular expression, or matches no module.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SiteError(f"{pattern!r} is not a regular expression: {error}") from error
    sites = {path for path in module_paths if path and expression.fullmatch(path)}
    if not sites:
        raise SiteError(f"{pattern!r} matches no module of the model (whole paths are matched)")
    return tuple(sorted(sites, key=_natural_key))


def _natural_key(path: str) -> list[tuple[int, str]]:
    """Return a sort key by which numbers compare as numbers, and after words."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
