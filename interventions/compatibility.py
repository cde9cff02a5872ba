"""Checks whether a model can take an artifact."""

from collections.abc import Iterator, Sequence

from interventions.artifact import Artifact
from interventions.layout import AffineShapes, RewardShapes, Shapes, shapes_of
from interventions.manifest import BaseModelReference, Manifest
from interventions.model import ModelDescription
from interventions.site_tensors import gate_owner


class IncompatibleArtifactError(ValueError):
    """The model cannot take the artifact; the message is a sentence that says why."""


def check_compatible(artifact: Artifact, model: ModelDescription) -> tuple[str, ...]:
    """Check that a loaded artifact fits a model; see `check_shapes`."""
    return check_shapes(artifact.manifest, shapes_of(artifact.parameters), model)


def check_shapes(manifest: Manifest, shapes: Shapes, model: ModelDescription) -> tuple[str, ...]:
    """Check that an artifact with these shapes fits a model.

    Returns:
        Warnings, one sentence each, about differences between the model and the manifest's base
        model, such as those of a fine-tuned sibling.

    Raises:
        IncompatibleArtifactError: a site is missing, a width differs, or the manifest's base model
            contradicts the artifact's tensors.
    """
    if isinstance(shapes, RewardShapes):
        _check_head(shapes, model)
    else:
        _check_sites(shapes, model)
    _check_consistent(manifest.base_model, shapes, model)
    return tuple(_differences(manifest.base_model, model))


def unservable_reason(shapes: Shapes, model: ModelDescription) -> str | None:
    """Return why the engine cannot apply an artifact that fits the model; None if it can."""
    sites = shapes.site_widths if isinstance(shapes, AffineShapes) else {}
    if impossible := [site for site in sites if site in model.impossible_sites]:
        reason = model.impossible_sites[impossible[0]]
        return f"This server cannot edit the site {_first(impossible)}. {reason}"
    if unprepared := [site for site in sites if site in model.unprepared_sites]:
        options = dict.fromkeys(model.unprepared_sites[site] for site in unprepared)
        return (
            f"This server has not prepared the site {_first(unprepared)}. Restart it, as it "
            "prepares the sites of all stored interventions when it starts, or add "
            f"{' '.join(options)} to its options."
        )
    return None


def _first(sites: Sequence[str]) -> str:
    """Name the first of some sites, and count the others."""
    others = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    return f'"{sites[0]}"{others}'


def _check_head(shapes: RewardShapes, model: ModelDescription) -> None:
    if shapes.width != model.head_width:
        raise IncompatibleArtifactError(
            f"The reward head takes states of width {shapes.width}; those before the model's "
            f"lm_head have width {model.head_width}."
        )


def _check_sites(shapes: AffineShapes, model: ModelDescription) -> None:
    missing = [site for site in shapes.site_widths if site not in model.site_widths]
    if missing:
        owner = gate_owner(missing[0])
        hint = ""
        if owner in shapes.site_widths:
            hint = f' The bias of a gate of site "{owner}" has shape ().'
        raise IncompatibleArtifactError(f"The model has no site {_first(missing)}.{hint}")
    for site, width in shapes.site_widths.items():
        if width != model.site_widths[site]:
            raise IncompatibleArtifactError(
                f'The artifact\'s map at site "{site}" has width {width}, the model has '
                f"{model.site_widths[site]} there."
            )


def _check_consistent(
    reference: BaseModelReference, shapes: Shapes, model: ModelDescription
) -> None:
    # The tensors fit the model here, so another hidden size contradicts them.
    if reference.hidden_size != model.hidden_size:
        raise IncompatibleArtifactError(
            f"The manifest's base model has hidden size {reference.hidden_size}, but its tensors "
            f"have the widths of a model of hidden size {model.hidden_size}, as the loaded one."
        )
    if not isinstance(shapes, AffineShapes):
        return
    for site in shapes.site_widths:
        layer = _layer(site)
        if layer is not None and layer >= reference.num_layers:
            raise IncompatibleArtifactError(
                f"The manifest's base model has {reference.num_layers} layers, but the artifact "
                f'has the site "{site}".'
            )


def _layer(site: str) -> int | None:
    """Return the first number in a module path, the decoder layer; a later one may be an expert."""
    return next((int(part) for part in site.split(".") if part.isdecimal()), None)


def _differences(reference: BaseModelReference, model: ModelDescription) -> Iterator[str]:
    compared: tuple[tuple[str, str | int, str | int], ...] = (
        ("architecture", reference.architecture, model.architecture),
        ("num_layers", reference.num_layers, model.num_layers),
        ("vocab_size", reference.vocab_size, model.vocab_size),
    )
    if reference.id != model.id:
        yield f'It was fitted on "{reference.id}"; the loaded model is "{model.id}".'
    for field, fitted, loaded in compared:
        if fitted != loaded:
            yield f"It was fitted on a model with {field} {fitted}; the loaded one has {loaded}."
    if reference.fingerprint is not None:
        yield from _fingerprint_differences(reference.fingerprint, model.fingerprint)


def _fingerprint_differences(fitted: str, loaded: str) -> Iterator[str]:
    """Compare fingerprints; an old one has no part for the configuration."""
    fitted_weights, _, fitted_configuration = fitted.partition("-")
    weights, _, configuration = loaded.partition("-")
    if fitted_weights != weights:
        yield "It was fitted on other weights than those of the loaded model (fingerprints differ)."
    if fitted_configuration and fitted_configuration != configuration:
        yield (
            "It was fitted on a model with another configuration than the loaded one's: its rotary "
            "positions, activations or norms, say (fingerprints differ)."
        )
