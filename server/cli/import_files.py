"""`steerserve import` makes artifacts of other projects' files, and runs no code from them."""

from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

from interventions.importers.argre import read_argre
from interventions.importers.control_vector import read_control_vector
from interventions.importers.sae import Feature, read_sae
from interventions.importers.sites import Place, parse_layers
from interventions.importers.statedicts import GaussianKind, TransportOptions, read_transport
from interventions.importers.svec import read_svec
from interventions.manifest import (
    RewardDefaults,
    RewardLimits,
)
from server.cli.fit import output
from server.cli.fit.options import AsJson, Description, Name, Out, default_setting
from server.cli.fit.strengths import greatest_strength
from server.cli.import_output import (
    ChosenStrengths,
    checked_fields,
    describe,
    write_head,
    write_maps,
)

_LIMITS: Final = RewardLimits()

Model: TypeAlias = Annotated[
    str,
    typer.Option(help="Model that the file was made for: embedded, a Hugging Face id or a folder."),
]
License: TypeAlias = Annotated[
    str,
    typer.Option(
        "--license", help="The file's licence, as an SPDX identifier; NOASSERTION: unknown."
    ),
]
Strength: TypeAlias = Annotated[
    float, typer.Option(help="Default strength, for requests that give none.")
]
MaxStrength: TypeAlias = Annotated[
    float | None,
    greatest_strength("0 to X of a map, or -X to X of a vector; if unset, 0 to 1, or -10 to 10"),
]
Layers: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Layers to steer, such as 4,10-15; if unset, all."),
]
VectorPlace: TypeAlias = Annotated[
    Place,
    typer.Option(
        "--place",
        help="Add the vectors to the residual stream after a layer, or to the output of its "
        "feed-forward network, which has the same effect, and which vLLM can edit too.",
    ),
]
Quantiles: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Leave values outside of these quantiles alone: q_0_100, q_1_99 and so on, or q_all "
        "to edit all; if unset, those that the files were saved with."
    ),
]

app = typer.Typer(
    no_args_is_help=True, help="Make an artifact of another project's files, offline."
)


@app.command("ml-lineas")
def ml_lineas(
    folder: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder of <module path>.statedict files.")
    ],
    model: Model,
    out: Out,
    quantiles: Quantiles = None,
    strength: Strength = 1.0,
    max_strength: MaxStrength = None,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import LinEAS maps of Apple's ml-lineas."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        chosen = ChosenStrengths(strength, max_strength)
        imported = read_transport(folder, described, "lineas", TransportOptions(quantiles))
        write_maps(out, fields, described, imported, "ml-lineas", chosen, as_json)


@app.command("ml-act")
def ml_act(
    folder: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder of <module path>.statedict files.")
    ],
    model: Model,
    out: Out,
    map_: Annotated[
        GaussianKind | None,
        typer.Option(
            "--map",
            help="Map of Mean-AcT or Gaussian-AcT, which save the same tensors; if unset, the "
            "folder's name tells it.",
        ),
    ] = None,
    quantiles: Quantiles = None,
    strength: Strength = 1.0,
    max_strength: MaxStrength = None,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import Lin-AcT, Mean-AcT or Gaussian-AcT maps of Apple's ml-act."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        chosen = ChosenStrengths(strength, max_strength)
        options = TransportOptions(quantiles, map_)
        imported = read_transport(folder, described, "lin-act", options)
        write_maps(out, fields, described, imported, "ml-act", chosen, as_json)


@app.command("argre")
def argre(
    path: Annotated[
        Path, typer.Argument(help="The head, or a folder with best_score_model.pth in it.")
    ],
    model: Model,
    out: Out,
    hidden_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of direction.pt, train_hidden_states.pt and train_attention_mask.pt; if "
            "unset, the head's folder."
        ),
    ] = None,
    positive_reward: Annotated[
        float | None,
        typer.Option(
            help="Mean reward of the training positives; if unset, the hidden states give it."
        ),
    ] = None,
    eta: Annotated[float, default_setting(_LIMITS.eta, "step size")] = 0.5,
    iterations: Annotated[int, default_setting(_LIMITS.iterations, "number of iterations")] = 5,
    direction_scale: Annotated[
        float, default_setting(_LIMITS.direction_scale, "scale of the directional step")
    ] = 1.0,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import a reward head of the ARGRE authors' code."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        states = hidden_dir or (path if path.is_dir() else path.parent)
        with output.progress("reading hidden states") as advance:
            imported = read_argre(path, states, described, positive_reward, advance)
        defaults = RewardDefaults(eta=eta, iterations=iterations, direction_scale=direction_scale)
        write_head(out, fields, described, imported, defaults, as_json)


@app.command("control-vector")
def control_vector(
    path: Annotated[Path, typer.Argument(help="The GGUF file of repeng or llama.cpp.")],
    model: Model,
    out: Out,
    layers: Layers = None,
    place: VectorPlace = "residual",
    strength: Strength = 1.0,
    max_strength: MaxStrength = None,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import a control vector of repeng or llama.cpp."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        chosen = ChosenStrengths(strength, max_strength)
        numbers = None if layers is None else parse_layers(layers)
        imported = read_control_vector(path, described, numbers, place)
        write_maps(out, fields, described, imported, "control vector", chosen, as_json)


@app.command("svec")
def svec(
    path: Annotated[Path, typer.Argument(help="The .svec file.")],
    model: Model,
    out: Out,
    layers: Annotated[
        str, typer.Option(metavar="LIST", help="Layers whose input is steered, such as 4,10-15.")
    ] = "10-15",
    place: VectorPlace = "residual",
    strength: Strength = 1.0,
    max_strength: MaxStrength = None,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import a steering vector of IBM's activation-steering."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        chosen = ChosenStrengths(strength, max_strength)
        imported = read_svec(path, described, parse_layers(layers), place)
        write_maps(out, fields, described, imported, "activation-steering", chosen, as_json)


@app.command("sae")
def sae(
    path: Annotated[
        Path, typer.Argument(help="The safetensors or .npz file, or the folder that it is in.")
    ],
    model: Model,
    out: Out,
    feature: Annotated[int, typer.Option(min=0, help="Number of the feature.")],
    site: Annotated[
        str | None,
        typer.Option(
            help="Module whose output the feature is added to, or its path and .input; if unset, "
            "the file's configuration tells it."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor of the decoder's row.")] = 1.0,
    strength: Strength = 1.0,
    max_strength: MaxStrength = None,
    name: Name = None,
    description: Description = "",
    license_: License = "NOASSERTION",
    as_json: AsJson = False,
) -> None:
    """Import a feature of a sparse autoencoder."""
    with output.user_errors_explained():
        fields = checked_fields(out, name, description, license_)
        described = describe(model)
        chosen = ChosenStrengths(strength, max_strength)
        imported = read_sae(path, described, Feature(feature, site, scale))
        write_maps(out, fields, described, imported, "sparse autoencoder", chosen, as_json)
