"""`steerserve fit lineas` and `steerserve fit argre` make an artifact from text files."""

from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import typer
from torch import Tensor

from interventions.manifest import (
    AffineDefaults,
    AffineLimits,
    AffineManifest,
    BaseModelReference,
    RewardDefaults,
    RewardLimits,
    RewardManifest,
)
from server.cli import fit_output
from server.cli.training_files import TextPair, read_lines, read_pairs
from server.engine.torch.model.loader import LoadedModel
from steering.fit.activations import collect_hidden_states
from steering.fit.argre import ArgreSettings, fit_argre
from steering.fit.lineas import LineasSettings, OptimizerName, fit_lineas
from steering.sites import default_sites, locate_site, match_sites

_FORWARD_BATCH = 32  # sequences in one forward pass that only collects hidden states
_AFFINE: Final = AffineLimits()
_REWARD: Final = RewardLimits()

Model: TypeAlias = Annotated[
    str, typer.Option(help="Model to fit on: embedded, a Hugging Face id or a folder.")
]
Out: TypeAlias = Annotated[Path, typer.Option(help="The artifact to write, X.safetensors.")]
Name: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The intervention's name; if unset, the file's name without its suffix."),
]
Description: TypeAlias = Annotated[str, typer.Option(help="Description for the manifest.")]
License: TypeAlias = Annotated[
    str, typer.Option("--license", help="The artifact's licence, as an SPDX identifier.")
]
Seed: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Seed of random draws and initial values.")
]
MaxTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Tokens to which longer texts are cut.")
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(help="Number format of the weights: auto, float32, bfloat16 or float16.")
]
Device: TypeAlias = Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to fit on.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; if unset, torch decides.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def _default(limits: tuple[float, float], what: str) -> Any:
    """Make the option of a setting that the artifact has for requests that give none."""
    low, high = limits
    return typer.Option(min=low, max=high, help=f"Default {what}, for requests that give none.")


app = typer.Typer(no_args_is_help=True, help="Fit an intervention to a model.")


@app.command()
def lineas(
    model: Model,
    source: Annotated[
        Path, typer.Option(help="File of sentences to steer away from, one per line.")
    ],
    target: Annotated[Path, typer.Option(help="File of sentences to steer towards, one per line.")],
    out: Out,
    samples: Annotated[int, typer.Option(min=1, help="Sentences drawn from each file.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = "sgd",
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the first step; it decays to 0.")
    ] = 0.1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sentences of each file in one optimizer step.")
    ] = 32,
    sites: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Regular expression for module paths; if unset, the model family's default sites.",
        ),
    ] = None,
    strength: Annotated[float, _default(_AFFINE.strength, "strength")] = 1.0,
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
    """Fit LinEAS maps, which move the activations on SOURCE to the distribution on TARGET."""
    with fit_output.user_errors_explained():
        fields = fit_output.manifest_fields(out, name, description, license_)
        settings = LineasSettings(
            samples=samples,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate,
            seed=seed,
        )
        source_file, target_file = read_lines(source), read_lines(target)
        loaded = fit_output.load(model, dtype, device, threads)
        pattern = sites or default_sites(loaded.description.architecture)
        known = loaded.description.site_widths
        outputs = [site for site in known if not locate_site(site).is_input]
        with fit_output.progress("learning maps") as advance:
            maps, report = fit_lineas(
                loaded.model,
                match_sites(pattern, outputs),
                [fit_output.tokenize(loaded, line, max_tokens) for line in source_file.lines],
                [fit_output.tokenize(loaded, line, max_tokens) for line in target_file.lines],
                settings,
                advance,
            )
        manifest = AffineManifest(
            **fields,
            kind="affine",
            method="lineas",
            base_model=BaseModelReference.model_validate(loaded.description, from_attributes=True),
            defaults=AffineDefaults(strength=strength),
            training={
                "source": source_file.name,
                "source_sha256": source_file.sha256,
                "target": target_file.name,
                "target_sha256": target_file.sha256,
                "sites": pattern,
                "max_tokens": max_tokens,
                **asdict(settings),
                **asdict(report),
                **fit_output.provenance(loaded),
            },
        )
        fit_output.write(out, manifest, maps, asdict(report), as_json)


@app.command()
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
    eta: Annotated[float, _default(_REWARD.eta, "step size")] = 0.5,
    iterations: Annotated[int, _default(_REWARD.iterations, "number of iterations")] = 5,
    direction_scale: Annotated[
        float, _default(_REWARD.direction_scale, "scale of the directional step")
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
    with fit_output.user_errors_explained():
        fields = fit_output.manifest_fields(out, name, description, license_)
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
        loaded = fit_output.load(model, dtype, device, threads)
        positives = _hidden_states(loaded, chosen, "positive", max_tokens)
        negatives = _hidden_states(loaded, chosen, "negative", max_tokens)
        with fit_output.progress("learning the reward") as advance:
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
                **fit_output.provenance(loaded),
            },
        )
        fit_output.write(out, manifest, head, asdict(report), as_json)


def _hidden_states(
    loaded: LoadedModel,
    pairs: list[TextPair],
    side: Literal["positive", "negative"],
    max_tokens: int,
) -> list[Tensor]:
    """Collect one side's hidden states before `lm_head`, for the continuation's tokens only."""
    sequences, starts = [], []
    for number, pair in enumerate(pairs, start=1):
        prompt = fit_output.tokenize(loaded, pair.prompt, max_tokens) if pair.prompt else []
        text = pair.positive if side == "positive" else pair.negative
        sequence = fit_output.tokenize(loaded, pair.prompt + text, max_tokens)
        # The prompt's length would be wrong if its last token merges with the continuation's first.
        common = zip(prompt, sequence, strict=False)
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], common))
        if start == len(sequence):
            raise fit_output.FitCommandError(
                f"pair {number}: nothing of its {side} is left within --max-tokens {max_tokens}"
            )
        sequences.append(sequence)
        starts.append(start)
    with fit_output.progress(f"reading hidden states, {side}") as advance:
        states = collect_hidden_states(
            loaded.model, loaded.lm_head, sequences, _FORWARD_BATCH, advance
        )
    return [rows[start:] for rows, start in zip(states, starts, strict=True)]
