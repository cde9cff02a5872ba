"""`steerserve fit argre` fits a reward head to pairs of texts."""

from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from torch import Tensor

from interventions.manifest import (
    BaseModelReference,
    RewardDefaults,
    RewardLimits,
    RewardManifest,
)
from server.cli.fit import output
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
from server.cli.fit.training_files import TextPair, read_pairs
from server.engine.torch.model.loader import LoadedModel
from steering.fit.argre import ArgreSettings, fit_argre
from steering.fit.hidden_states import collect_hidden_states

_FORWARD_BATCH: Final = 32  # sequences in one forward pass that only collects hidden states
_LIMITS: Final = RewardLimits()


def argre(
    model: Model,
    pairs: Annotated[
        Path,
        typer.Option(help='File of JSON lines {"prompt"?, "positive", "negative"}.'),
    ],
    out: Out,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of pairs to use, from the first on; if unset, all."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in one optimizer step.")] = 4,
    hidden_units: Annotated[
        int, typer.Option(min=1, max=8192, help="Hidden units of the reward head.")
    ] = 1024,
    interpolations: Annotated[
        int,
        typer.Option(
            min=0, help="Interpolated points between the negative and the positive hidden states."
        ),
    ] = 7,
    eta: Annotated[float, default_setting(_LIMITS.eta, "step size")] = 0.5,
    iterations: Annotated[int, default_setting(_LIMITS.iterations, "number of iterations")] = 5,
    direction_scale: Annotated[
        float, default_setting(_LIMITS.direction_scale, "scale of the directional step")
    ] = 1.0,
    name: Name = None,
    description: Description = "",
    license_: License = "Apache-2.0",
    seed: Seed = 0,
    max_tokens: MaxTokens = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit an ARGRE reward head and direction on pairs of texts."""
    with output.user_errors_explained():
        fields = output.manifest_fields(out, name, description, license_)
        settings = ArgreSettings(
            hidden_units=hidden_units,
            interpolations=interpolations,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        file, all_pairs = read_pairs(pairs)
        chosen = all_pairs[:samples]
        loaded = output.load(model, dtype, device, threads)
        positives = _hidden_states(loaded, chosen, "positive", max_tokens)
        negatives = _hidden_states(loaded, chosen, "negative", max_tokens)
        with output.progress("learning the reward") as advance:
            head, report = fit_argre(positives, negatives, settings, advance)
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
                "samples": len(chosen),
                "optimizer": "adamw",
                "max_tokens": max_tokens,
                **asdict(settings),
                **asdict(report),
                **output.provenance(loaded),
            },
        )
        output.write(out, manifest, head, asdict(report), as_json)


def _hidden_states(
    loaded: LoadedModel,
    pairs: list[TextPair],
    side: Literal["positive", "negative"],
    max_tokens: int,
) -> list[Tensor]:
    """Collect one side's hidden states before `lm_head`, for the continuation's tokens only."""
    sequences, starts = [], []
    for number, pair in enumerate(pairs, start=1):
        prompt = output.tokenize(loaded, pair.prompt, max_tokens) if pair.prompt else []
        text = pair.positive if side == "positive" else pair.negative
        sequence = output.tokenize(loaded, pair.prompt + text, max_tokens)
        # The prompt's length would be wrong if its last token merges with the continuation's first.
        common = zip(prompt, sequence, strict=False)
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], common))
        if start == len(sequence):
            raise output.FitCommandError(
                f"pair {number}: nothing of its {side} is left within --max-tokens {max_tokens}"
            )
        sequences.append(sequence)
        starts.append(start)
    with output.progress(f"reading hidden states, {side}") as advance:
        states = collect_hidden_states(
            loaded.model, loaded.lm_head, sequences, _FORWARD_BATCH, advance
        )
    return [rows[start:] for rows, start in zip(states, starts, strict=True)]
