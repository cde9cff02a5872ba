"""Makes manifests for the interventions of tiny test models."""

from datetime import UTC, datetime

from interventions.manifest import AffineManifest, BaseModelReference, Manifest, RewardManifest
from interventions.model import ModelDescription
from steering.affine import AffineParameters
from steering.reward import RewardHead


def manifest_of(
    parameters: AffineParameters | RewardHead,
    model: ModelDescription,
    name: str,
    limits: dict[str, tuple[float, float]] | None = None,
) -> Manifest:
    """Return a manifest that fits the parameters and the model, with the given limits if any."""
    common = {
        "format": "steerserve/1",
        "name": name,
        "description": "random, for tests",
        "created": datetime(2026, 11, 21, tzinfo=UTC),
        "license": "Apache-2.0",
        "base_model": BaseModelReference(
            id=model.id,
            architecture=model.architecture,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
            fingerprint=model.fingerprint,
        ),
        "limits": limits or {},
    }
    if isinstance(parameters, RewardHead):
        defaults: dict[str, float] = {"eta": 0.5, "iterations": 5}
        return RewardManifest.model_validate(
            {**common, "kind": "reward", "method": "argre", "defaults": defaults}
        )
    return AffineManifest.model_validate(
        {**common, "kind": "affine", "method": "lineas", "defaults": {"strength": 1.0}}
    )
