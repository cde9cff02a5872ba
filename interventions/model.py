"""Describes a loaded model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The properties of a loaded model that decide whether an artifact fits it."""

    id: str
    architecture: str  # the class name, e.g. "LlamaForCausalLM"
    hidden_size: int
    num_layers: int
    vocab_size: int
    head_width: int  # lm_head.in_features; not hidden_size in OPT-350m
    site_widths: Mapping[str, int]  # site (see `steering.sites`) -> its width
    # A sha256 of the weights' names, shapes and samples, "-", and a sha256 of the configuration.
    # Older manifests have only the first of them.
    fingerprint: str
    # An engine may have to prepare its sites when it starts. Of the sites above, it then cannot
    # edit these: site -> the option that would have prepared it.
    unprepared_sites: Mapping[str, str] = field(default_factory=dict)
    # Nor these, with any option: site -> a sentence that says why.
    impossible_sites: Mapping[str, str] = field(default_factory=dict)

    @property
    def short_fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this model from others."""
        return hashlib.sha256(self.fingerprint.encode()).hexdigest()[:12]
