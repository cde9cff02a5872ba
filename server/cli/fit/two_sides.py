"""Prepares fits to two files of sentences, and makes the manifest of what was fitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interventions.manifest import (
    AffineDefaults,
    AffineLimits,
    AffineManifest,
    BaseModelReference,
    TrainingValue,
)
from server.cli.fit import output
from server.cli.fit.manifest_fields import provenance
from server.cli.fit.training_files import TrainingFile, read_sides
from server.engine.torch.model.loader import LoadedModel
from steering.fit.activations import TokenIds
from steering.fit.sampling import draw


@dataclass(frozen=True, slots=True)
class TwoSides:
    """A model, and the token ids of the sentences to steer away from and towards."""

    loaded: LoadedModel
    source: list[TokenIds]
    target: list[TokenIds]
    record: Mapping[str, TrainingValue]  # identifies the sentences, for the manifest

    @classmethod
    def read(
        cls,
        *,
        source: Path,
        target: Path,
        samples: int | None,
        seed: int,
        max_tokens: int,
        model: str,
        dtype: str,
        device: str,
        threads: int | None,
    ) -> "TwoSides":
        """Read the files, load the model, and draw `samples` sentences of each file, or take all.

        With the same number and seed, `fit lineas` draws the same sentences.
        """
        source_file, target_file = read_sides(source, target)
        loaded = output.load(model, dtype, device, threads)
        random = torch.Generator().manual_seed(seed)

        def sentences(file: TrainingFile, side: str) -> list[TokenIds]:
            every: list[TokenIds] = [*output.tokenize_lines(loaded, file, max_tokens)]
            return every if samples is None else draw(every, samples, random, side, "samples")

        return cls(
            loaded=loaded,
            source=sentences(source_file, "source"),
            target=sentences(target_file, "target"),
            record={
                "source": source_file.name,
                "source_sha256": source_file.sha256,
                "target": target_file.name,
                "target_sha256": target_file.sha256,
                "samples": samples,
                "seed": seed,
                "max_tokens": max_tokens,
            },
        )

    def manifest(
        self,
        fields: Mapping[str, Any],
        method: str,
        strength: float,
        limits: tuple[float, float],
        training: Mapping[str, TrainingValue],
    ) -> AffineManifest:
        """Make the manifest of maps fitted to these sentences.

        Args:
            fields: from `manifest_fields`.
            method: the manifest's.
            strength: the default, within the limits.
            limits: the least and greatest strength that a request may ask for.
            training: the settings and figures of the fit.
        """
        described = self.loaded.description
        return AffineManifest(
            **fields,
            kind="affine",
            method=method,
            base_model=BaseModelReference.model_validate(described, from_attributes=True),
            defaults=AffineDefaults(strength=strength),
            limits=AffineLimits(strength=limits),
            training={
                **self.record,
                "source_sentences": len(self.source),
                "target_sentences": len(self.target),
                **training,
                **provenance(self.loaded),
            },
        )
