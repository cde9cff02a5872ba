"""`steerserve fit argre` fits a reward head to pairs of texts."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from interventions.manifest import (
    BaseModelReference,
    RewardDefaults,
    RewardLimits,
    RewardManifest,
    TrainingValue,
)
from server.cli.fit import output
from server.cli.fit.continuations import continuations, whole_texts
from server.cli.fit.manifest_fields import manifest_fields, provenance
from server.cli.fit.options import (
    AsJson,
    Description,
    Device,
    Dtype,
    License,
    MaxTokens,
    Model,
    Name,
    Out,
    Seed,
    Threads,
    default_setting,
)
from server.cli.fit.training_files import TrainingFile, read_lines, read_pairs
from server.engine.torch.model.loader import LoadedModel
from steering.fit.argre import ArgreReport, fit_argre
from steering.fit.argre_settings import ArgreSettings
from steering.fit.directions import DirectionName
from steering.fit.hidden_states import Continuation, SpooledStates, spooled_hidden_states

_FORWARD_BATCH: Final = 32  # texts in one forward pass that only collects hidden states
_LIMITS: Final = RewardLimits()
_DEFAULTS: Final = ArgreSettings()


def argre(
    model: Model,
    pairs: Annotated[
        Path,
        typer.Option(
            help='File of JSON lines {"prompt"?, "positive", "negative"}, or with a prompt for '
            'each side: {"positive_prompt", "positive", "negative_prompt", "negative"}.'
        ),
    ],
    out: Out,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of pairs to use, from the first on; if unset, all."),
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option(
            help="File of neutral texts, one per line, that the intervention is to leave alone: "
            "they are learnt as positives without a negative."
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Share of the pairs that select the best epoch and are not trained on; at 0 the "
            "last epoch is kept."
        ),
    ] = _DEFAULTS.held_out,
    direction: Annotated[
        DirectionName,
        typer.Option(
            help="Direction from negatives to positives: the mean difference of their last tokens "
            "(the authors' code), or its first principal component (their paper)."
        ),
    ] = _DEFAULTS.direction,
    interpolations: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Interpolated points between the negative and the positive hidden states.",
        ),
    ] = _DEFAULTS.interpolations,
    beta: Annotated[
        float, typer.Option(help="Scale of the difference of rewards in the loss.")
    ] = _DEFAULTS.beta,
    center: Annotated[
        float, typer.Option(help="Weight of the loss term that keeps rewards around 0.")
    ] = _DEFAULTS.center,
    neutral_weight: Annotated[
        float,
        typer.Option(
            help="Weight of the loss term that raises the rewards of neutral texts' tokens to "
            "those of positives; 0 leaves it out."
        ),
    ] = _DEFAULTS.neutral_weight,
    reward_quantile: Annotated[
        float | None,
        typer.Option(
            help="Quantile of the positives' token rewards, from 0 to 1, to close the gap to; if "
            "unset, their mean."
        ),
    ] = _DEFAULTS.reward_quantile,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = _DEFAULTS.epochs,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pairs in one optimizer step.")
    ] = _DEFAULTS.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate.")
    ] = _DEFAULTS.learning_rate,
    warmup_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps up to the highest learning rate, at most a tenth of all; a cosine follows.",
        ),
    ] = _DEFAULTS.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = (
        _DEFAULTS.weight_decay
    ),
    hidden_units: Annotated[
        int, typer.Option(min=1, max=8192, help="Hidden units of the reward head.")
    ] = _DEFAULTS.hidden_units,
    eta: Annotated[float, default_setting(_LIMITS.eta, "step size")] = 0.5,
    iterations: Annotated[int, default_setting(_LIMITS.iterations, "number of iterations")] = 5,
    direction_scale: Annotated[
        float, default_setting(_LIMITS.direction_scale, "scale of the directional step")
    ] = 1.0,
    spool: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the temporary file of hidden states, 2 or 4 bytes a number; if unset, "
            "that of --out."
        ),
    ] = None,
    name: Name = None,
    description: Description = "",
    license_: License = "Apache-2.0",
    seed: Seed = _DEFAULTS.seed,
    max_tokens: MaxTokens = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit an ARGRE reward head and direction on pairs of texts."""
    with output.user_errors_explained(), ExitStack() as spools:
        fields = manifest_fields(out, name, description, license_)
        settings = ArgreSettings(
            hidden_units=hidden_units,
            direction=direction,
            interpolations=interpolations,
            beta=beta,
            center=center,
            neutral_weight=neutral_weight,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            held_out=held_out,
            reward_quantile=reward_quantile,
            seed=seed,
        )
        file, all_pairs = read_pairs(pairs)
        if samples is not None and samples > len(all_pairs):
            raise output.FitCommandError(
                f"--samples {samples}: {pairs} has {len(all_pairs)} pairs; leave --samples out to "
                "use all"
            )
        neutral_file = None if neutral is None else read_lines(neutral)
        loaded = output.load(model, dtype, device, threads)
        positives, negatives = continuations(loaded, all_pairs[:samples], max_tokens)
        neutrals = [] if neutral_file is None else whole_texts(loaded, neutral_file, max_tokens)
        states = [
            _spooled(spools, loaded, side, texts, spool or out.parent)
            for side, texts in (
                ("positive", positives),
                ("negative", negatives),
                ("neutral", neutrals),
            )
        ]
        with output.progress("learning the reward") as advance:
            head, report = fit_argre(states[0], states[1], settings, advance, states[2])
        _warn_if_diverged(report)
        figures = {key: value for key, value in asdict(report).items() if value is not None}
        manifest = RewardManifest(
            **fields,
            kind="reward",
            method="argre",
            base_model=BaseModelReference.model_validate(loaded.description, from_attributes=True),
            defaults=RewardDefaults(
                eta=eta, iterations=iterations, direction_scale=direction_scale
            ),
            training={
                "pairs": file.name,
                "pairs_sha256": file.sha256,
                "samples": len(positives),
                **_neutral_fields(neutral_file),
                "optimizer": "adamw",
                "max_tokens": max_tokens,
                **asdict(settings),
                **asdict(report),
                **provenance(loaded),
            },
        )
        output.write(out, manifest, head, figures, as_json)


def _spooled(
    spools: ExitStack, loaded: LoadedModel, side: str, texts: Sequence[Continuation], folder: Path
) -> SpooledStates:
    """Keep texts' hidden states before `lm_head` in a file, until `spools` is closed."""
    with output.progress(f"reading hidden states, {side}") as advance:
        return spools.enter_context(
            spooled_hidden_states(
                loaded.model, loaded.lm_head, texts, _FORWARD_BATCH, folder, advance
            )
        )


def _warn_if_diverged(report: ArgreReport) -> None:
    """Warn of a loss that rose: rewards then grow without bound, and the head is of little use."""
    if report.final_loss > report.initial_loss:
        output.warn(
            f"the loss rose from {report.initial_loss:.4g} in the first epoch to "
            f"{report.final_loss:.4g} in the last: lower --learning-rate or --neutral-weight, and "
            "measure the artifact before you use it"
        )


def _neutral_fields(file: TrainingFile | None) -> dict[str, TrainingValue]:
    if file is None:
        return {}
    return {
        "neutral": file.name,
        "neutral_sha256": file.sha256,
        "neutral_samples": len(file.lines),
    }
