"""What a registry's folder holds when it is opened, after whatever happened to it before."""

import logging
from pathlib import Path

from interventions.artifact import ArtifactError, ArtifactLimits, read_summary
from interventions.catalogue import OBJECT_SUFFIX, RECORD_SUFFIX, Catalogue, Damage
from interventions.manifest import DIGEST_PATTERN, NAME_PATTERN
from interventions.records import RecordError, parse_record

_logger = logging.getLogger(__name__)


def read_catalogue(objects: Path, names: Path, limits: ArtifactLimits) -> Catalogue:
    """Read every record and every object's header; nothing is changed, no damage stops it.

    Each damaged file is logged as a warning.
    """
    catalogue = Catalogue()
    for path in sorted(names.iterdir()):
        _read_record(path, catalogue)
    for path in sorted(file for shard in objects.iterdir() for file in _files(shard)):
        _read_object(path, catalogue, limits)
    _note_missing(objects, catalogue)
    for damage in catalogue.damaged():
        _logger.warning("damaged, left as it is: %s: %s", damage.path, damage.reason)
    return catalogue


def remove_stale(temporary_folder: Path) -> None:
    """Remove what unfinished writes left; only for the holder of the registry's lock."""
    for path in temporary_folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _logger.warning("not one of the registry's files, left as it is: %s", path)
        else:
            path.unlink()


def _files(shard: Path) -> list[Path]:
    return list(shard.iterdir()) if shard.is_dir() else [shard]


def _read_record(path: Path, catalogue: Catalogue) -> None:
    name = path.name.removesuffix(RECORD_SUFFIX)
    try:
        if name == path.name or not NAME_PATTERN.match(name):
            raise RecordError("the file's name is not that of a record")
        catalogue.records[name] = parse_record(path.read_bytes(), name)
    except (RecordError, OSError) as error:
        catalogue.damaged_records[path.name] = Damage(path, str(error))


def _read_object(path: Path, catalogue: Catalogue, limits: ArtifactLimits) -> None:
    digest = path.name.removesuffix(OBJECT_SUFFIX)
    try:
        if not DIGEST_PATTERN.match(digest) or path.parent.name != digest[:2]:
            raise ArtifactError("The file's name is not that of an object.")
        catalogue.objects[digest] = read_summary(path, limits)
    except (ArtifactError, OSError) as error:
        catalogue.damaged_objects[path.name] = Damage(path, str(error))


def _note_missing(objects: Path, catalogue: Catalogue) -> None:
    for name, record in catalogue.records.items():
        if record.current is None or record.current.digest in catalogue.objects:
            continue
        digest = record.current.digest
        path = objects / digest[:2] / f"{digest}{OBJECT_SUFFIX}"
        catalogue.damaged_objects.setdefault(
            path.name, Damage(path, f'The artifact that "{name}" points to is missing.')
        )
