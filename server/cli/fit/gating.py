"""The gates of `steerserve fit`: their fit, and their entries in the manifest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from interventions.manifest import TrainingValue
from server.cli.fit import output
from server.cli.fit.checkpoint import digest
from server.cli.fit.gate_options import GateKind
from server.cli.fit.training_files import TrainingFile, read_lines
from server.engine.torch.model.loader import LoadedModel
from steering.affine import AffineMap, AffineParameters, Gate
from steering.fit.activations import TokenIds
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import GateTexts, split_texts
from steering.fit.gate_training import GateTraining
from steering.fit.gates import fit_gates, held_out_accuracy
from steering.fit.pooling import Pooling
from steering.fit.sparsity import support_of

# A manifest is limited in size; with more sites, it has their mean and minimum only.
_MOST_SITES_LISTED: Final = 256


@dataclass(frozen=True, slots=True)
class GatePlan:
    """The gates that the options ask for."""

    kind: Literal["regression", "end-to-end"]
    control: TrainingFile
    settings: GateSettings
    min_accuracy: float
    control_weight: float = 1.0  # for end-to-end


@dataclass(frozen=True, slots=True)
class FittedGates:
    """Gates, and how often each is right on held-out sentences."""

    plan: GatePlan
    texts: GateTexts
    gates: Mapping[str, Gate]
    accuracy: Mapping[str, float]

    @property
    def end_to_end(self) -> bool:
        """True if the gates are learnt together with the maps."""
        return self.plan.kind == "end-to-end"

    @property
    def identity(self) -> dict[str, object]:
        """The options and sentences that the fit of the maps depends on, for its checkpoint."""
        if not self.end_to_end:
            return {}
        return {
            "gate": self.plan.kind,
            "control": digest(self.texts.control),
            "control_weight": self.plan.control_weight,
            **{f"gate_{name}": value for name, value in asdict(self.plan.settings).items()},
        }

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
            "gate_pooling": plan.settings.pooling,
            "gate_held_out": plan.settings.held_out,
            "gate_seed": plan.settings.seed,
            "gate_source_sentences": len(self.texts.source),
            "gate_control_sentences": len(self.texts.control),
            "gate_min_accuracy": plan.min_accuracy,
            **({"gate_control_weight": plan.control_weight} if self.end_to_end else {}),
            **self.figures,
            **{f"gate_accuracy.{site}": value for site, value in listed.items()},
        }

    def start(self) -> GateTraining | None:
        """Return the gates that learning them with the maps starts from; None for a regression."""
        if not self.end_to_end:
            return None
        return GateTraining(self.gates, self.texts.control, self.plan.control_weight)

    def sites_of_maps(self, sites: Sequence[str]) -> tuple[str, ...]:
        """Return the sites for which maps are fitted: those whose gates are accurate enough.

        Gates that are learnt with the maps are measured after the fit, and none is left out here.

        Raises:
            FitCommandError: no gate is accurate enough.
        """
        return tuple(sites) if self.end_to_end else self._accurate(sites)

    def source_of_maps(self, source: Sequence[TokenIds], samples: int) -> Sequence[TokenIds]:
        """Return the source sentences that the maps may be fitted on.

        Gates that are learnt with the maps must not see the sentences that test them.

        Raises:
            FitCommandError: fewer are left than samples are asked for.
        """
        if not self.end_to_end:
            return source
        if len(self.texts.source) < samples:
            raise output.FitCommandError(
                f"--samples {samples}: --gate-held-out leaves {len(self.texts.source)} different "
                "sentences of --source to learn from; give more, or set --samples to that number"
            )
        return self.texts.source

    def after(self, loaded: LoadedModel, maps: AffineParameters) -> "FittedGates":
        """Return the gates after the fit of the maps, measured again if that has changed them."""
        if not self.end_to_end:
            return self
        learnt = {site: map_.gate for site, map_ in maps.items() if map_.gate is not None}
        return replace(
            self,
            gates=learnt,
            accuracy=_accuracy(loaded, learnt, self.texts, self.plan.settings.pooling),
        )

    def put_on(self, maps: AffineParameters) -> dict[str, AffineMap]:
        """Return the maps with their gates, without those whose gate is not accurate enough.

        Raises:
            FitCommandError: no gate is accurate enough.
        """
        return {
            site: replace(maps[site], gate=self.gates[site]) for site in self._accurate(list(maps))
        }

    def _accurate(self, sites: Sequence[str]) -> tuple[str, ...]:
        least = self.plan.min_accuracy
        accurate = tuple(site for site in sites if self.accuracy[site] >= least)
        if not accurate:
            best = max(self.accuracy[site] for site in sites)
            raise output.FitCommandError(
                f"--gate-min-accuracy {least:g}: no gate reaches it, the best is right about "
                f"{best:.3g} of the held-out sentences"
            )
        return accurate


def plan_gates(
    kind: GateKind,
    control: Path | None,
    settings: GateSettings,
    min_accuracy: float,
    control_weight: float,
) -> GatePlan | None:
    """Return the gates that a command's options ask for; None if they ask for none.

    Raises:
        FitCommandError: gates without a control, or an option that this kind of gates has not.
        TrainingFileError: the control cannot be read.
    """
    if kind != "end-to-end" and control_weight != 1:
        raise output.FitCommandError("--control-weight is for --gate end-to-end")
    if not (math.isfinite(control_weight) and control_weight > 0):
        raise output.FitCommandError("--control-weight must be a positive number")
    if kind == "none":
        if control is not None:
            raise output.FitCommandError("--control is for gates: ask for them with --gate")
        if settings != GateSettings(seed=settings.seed) or min_accuracy > 0:
            raise output.FitCommandError(
                "--gate-components, --gate-l2, --gate-pooling, --gate-held-out and "
                "--gate-min-accuracy are for gates: ask for them with --gate"
            )
        return None
    if control is None:
        raise output.FitCommandError(
            f"--gate {kind} needs --control, a file of sentences that must stay as they are"
        )
    return GatePlan(kind, read_lines(control), settings, min_accuracy, control_weight)


def kept_by_gates(maps: AffineParameters) -> dict[str, int]:
    """Return a manifest's counts of the sites and coordinates that maps with gates act on.

    Maps whose gates are not accurate enough were fitted, and are not among them.
    """
    support = support_of(maps)
    return {"sites_kept": support.sites_kept, "coordinates_kept": support.coordinates_kept}


def fit(
    loaded: LoadedModel,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    plan: GatePlan,
    max_tokens: int,
) -> FittedGates:
    """Fit a gate for each site by a regression, and measure how often it is right.

    Raises:
        FitCommandError: a line of the control has no token.
        FitError: see `split_texts` and `fit_gates`.
    """
    texts = split_texts(
        source, output.tokenize_lines(loaded, plan.control, max_tokens), plan.settings
    )
    with output.progress("learning gates") as advance:
        gates = fit_gates(loaded.model, sites, texts, plan.settings, advance)
    return FittedGates(plan, texts, gates, _accuracy(loaded, gates, texts, plan.settings.pooling))


def _accuracy(
    loaded: LoadedModel, gates: Mapping[str, Gate], texts: GateTexts, pooling: Pooling
) -> dict[str, float]:
    with output.progress("testing gates") as advance:
        accuracy = held_out_accuracy(loaded.model, gates, texts, advance, pooling)
    # Rounded at once, so that --gate-min-accuracy takes a number that was printed.
    return {site: round(value, 4) for site, value in accuracy.items()}
