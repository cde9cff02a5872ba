"""The gates of `steerserve fit`: their options, their fit, and their entries in the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import typer

from interventions.manifest import TrainingValue
from server.cli.fit import output
from server.cli.fit.training_files import TrainingFile
from server.engine.torch.model.loader import LoadedModel
from steering.affine import AffineMap, AffineParameters, Gate
from steering.fit.activations import TokenIds
from steering.fit.gates import (
    GateSettings,
    GateTexts,
    fit_gates,
    held_out_accuracy,
    split_texts,
)

Control: TypeAlias = Annotated[
    Path, typer.Option(help="File of neutral sentences that must stay as they are, one per line.")
]
GateComponents: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Principal components of activations that a gate is fitted on.")
]
GateL2: TypeAlias = Annotated[
    float, typer.Option("--gate-l2", help="Penalty on the squared weights of a gate's regression.")
]
GateHeldOut: TypeAlias = Annotated[
    float,
    typer.Option(help="Share of the sentences that only measure how often a gate is right."),
]
GateMinAccuracy: TypeAlias = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Leave out the map of a site whose gate is right less often on held-out sentences.",
    ),
]

# A manifest is limited in size; with more sites, it says their mean and minimum only.
_MOST_SITES_LISTED: Final = 256


@dataclass(frozen=True, slots=True)
class GatePlan:
    """The gates that the options ask for."""

    kind: Literal["regression"]
    control: TrainingFile
    settings: GateSettings
    min_accuracy: float


@dataclass(frozen=True, slots=True)
class FittedGates:
    """Gates, and how often each is right on held-out sentences."""

    plan: GatePlan
    texts: GateTexts
    gates: Mapping[str, Gate]
    accuracy: Mapping[str, float]

    @property
    def figures(self) -> dict[str, float]:
        """The numbers that the command prints."""
        values = self.accuracy.values()
        return {
            "gate_accuracy": round(sum(values) / len(values), 4),
            "gate_accuracy_min": min(values),
        }

    @property
    def training(self) -> dict[str, TrainingValue]:
        """The gates' entries in the manifest; a site's accuracy is `gate_accuracy.<site>`."""
        plan = self.plan
        listed = self.accuracy if len(self.accuracy) <= _MOST_SITES_LISTED else {}
        return {
            "gate": plan.kind,
            "gate_control": plan.control.name,
            "gate_control_sha256": plan.control.sha256,
            "gate_components": plan.settings.components,
            "gate_l2": plan.settings.l2,
            "gate_held_out": plan.settings.held_out,
            "gate_seed": plan.settings.seed,
            "gate_source_sentences": len(self.texts.source),
            "gate_control_sentences": len(self.texts.control),
            "gate_min_accuracy": plan.min_accuracy,
            **self.figures,
            **{f"gate_accuracy.{site}": value for site, value in listed.items()},
        }

    def put_on(self, maps: AffineParameters) -> dict[str, AffineMap]:
        """Return the maps with their gates, without those whose gate is not accurate enough.

        Raises:
            FitCommandError: no gate is accurate enough.
        """
        least = self.plan.min_accuracy
        kept = {
            site: replace(map_, gate=self.gates[site])
            for site, map_ in maps.items()
            if self.accuracy[site] >= least
        }
        if not kept:
            best = max(self.accuracy[site] for site in maps)
            raise output.FitCommandError(
                f"--gate-min-accuracy {least:g}: no gate reaches it, the best is right about "
                f"{best:.3g} of the held-out sentences"
            )
        return kept


def fit(
    loaded: LoadedModel,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    plan: GatePlan,
    max_tokens: int,
) -> FittedGates:
    """Fit a gate for each site, and measure how often it is right.

    Raises:
        FitError: see `split_texts` and `fit_gates`.
    """
    control = [output.tokenize(loaded, line, max_tokens) for line in plan.control.lines]
    texts = split_texts(source, control, plan.settings)
    with output.progress("learning gates") as advance:
        gates = fit_gates(loaded.model, sites, texts, plan.settings, advance)
    with output.progress("testing gates") as advance:
        accuracy = held_out_accuracy(loaded.model, gates, texts, advance)
    # Rounded at once, so that --gate-min-accuracy takes a number that was printed.
    rounded = {site: round(value, 4) for site, value in accuracy.items()}
    return FittedGates(plan, texts, gates, rounded)
