"""Names sites, and lists the default sites of affine maps by architecture.

A site is a module's output, or its input (its first argument). An output is named by the module's
Hugging Face path, an input by the path and `.input`.

The default sites are a table: architecture -> regular expression over module paths. They follow the
LinEAS authors: one or two layer norms in each block, depending on the model family. Fitting also
takes any other regular expression; an artifact lists its sites one by one.
"""

import re
from collections.abc import Iterable, Mapping
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


# The input of each block's feed-forward network, after its norm.
_FEED_FORWARD_INPUT: Final = r"model\.layers\.\d+\.post_attention_layernorm"

# By class name, as in a model's `config.architectures`.
DEFAULT_SITES: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": _FEED_FORWARD_INPUT,
    "MistralForCausalLM": _FEED_FORWARD_INPUT,
    "Phi3ForCausalLM": _FEED_FORWARD_INPUT,
    "Qwen2ForCausalLM": _FEED_FORWARD_INPUT,
    "Qwen3ForCausalLM": _FEED_FORWARD_INPUT,
    # The outputs of each block's attention and feed-forward network, after their norms.
    "Gemma2ForCausalLM": (
        r"model\.layers\.\d+\.(post_attention_layernorm|post_feedforward_layernorm)"
    ),
    # The inputs of each block's attention and feed-forward network, after their norms.
    "GPT2LMHeadModel": r"transformer\.h\.\d+\.(ln_1|ln_2)",
    # The outputs of each block's two layer norms.
    "OPTForCausalLM": r"model\.decoder\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm)",
}


HEAD_OUTPUTS: Final = r".*attn\.(o_proj|out_proj|c_proj)\.input"
"""Pattern of the sites at which an attention block's heads have their outputs side by side, in the
families of `DEFAULT_SITES`."""


def block_outputs(sites: Iterable[str], blocks: int) -> tuple[str, ...]:
    """Return the outputs of a model's blocks, which hold the residual stream, the first one first.

    Args:
        sites: the model's sites.
        blocks: number of its blocks (layers).

    Raises:
        SiteError: no list of modules of the model has so many members.
    """
    numbers: dict[str, set[str]] = {}
    for site in sites:
        parent, _, number = site.rpartition(".")
        numbers.setdefault(parent, set()).add(number)
    wanted = [str(number) for number in range(blocks)]
    lists = [parent for parent, members in numbers.items() if members.issuperset(wanted)]
    if not lists:
        raise SiteError(f"the model has no list of {blocks} blocks: name sites by their paths")
    # A list inside a block, such as its experts, has a longer path.
    parent = min(lists, key=len)
    return tuple(f"{parent}.{number}" for number in wanted)


def default_sites(architecture: str) -> str:
    """Return the pattern of an architecture's default sites.

    Args:
        architecture: the model's class name, e.g. "LlamaForCausalLM".

    Raises:
        SiteError: the table has no such architecture; the message lists all it has.
    """
    if architecture in DEFAULT_SITES:
        return DEFAULT_SITES[architecture]
    known = ", ".join(sorted(DEFAULT_SITES))
    raise SiteError(
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


def choose_sites(pattern: str, sites: Iterable[str]) -> tuple[str, ...]:
    """Return the outputs and inputs of modules that a pattern chooses, layer 2 before layer 10.

    A pattern that matches a module's path as a whole chooses the module's output. One that matches
    `<module path>.input` and not the path chooses the input. So `.*` chooses no input, and
    `.*\\.input` all of them.

    Args:
        pattern: a regular expression.
        sites: the model's sites.

    Raises:
        SiteError: the pattern is not a regular expression, or chooses no site.
    """
    known = set(sites)
    matched = match_sites(pattern, known | {_module(site) for site in known})
    outputs = {site for site in matched if not locate_site(site).is_input}
    chosen = [
        site
        for site in matched
        if site in known and (site in outputs or _module(site) not in outputs)
    ]
    if not chosen:
        raise SiteError(
            f"{pattern!r} matches no module whose output is one vector for each token, and no input"
        )
    return tuple(chosen)


def _module(site: str) -> str:
    return locate_site(site).module


def _natural_key(path: str) -> list[tuple[int, str]]:
    """Return a sort key by which numbers compare as numbers, and after words."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
