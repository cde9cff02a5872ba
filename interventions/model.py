"""What a model is, in numbers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What has to be known of a loaded model to say whether an artifact fits it."""

    id: str
    architecture: str  # the class name, e.g. "LlamaForCausalLM"
    hidden_size: int
    num_layers: int
    vocab_size: int
    head_width: int  # lm_head.in_features; not hidden_size in OPT-350m
    site_widths: Mapping[str, int]  # site (see `steering.sites`) -> its width
    # Two sha256 with "-" between them: that of the weights' names, shapes and samples, and that of
    # the configuration. Manifests written before it covered the configuration have the first alone.
    fingerprint: str

    @property
    def short_fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this model from others."""
        return hashlib.sha256(self.fingerprint.encode()).hexdigest()[:12]
