"""Origin of a RUN's seed and its licence, which the cards of its experts state."""

import re
from pathlib import Path

from huggingface_hub import metadata_load

from clustering.errors import UserError, first_line
from clustering.hub_files import LICENCES
from xelm.models.checkpoint import README
from xelm.runs.run import Run

# A snapshot in the cache of the Hub's library: .../models--OWNER--NAME/snapshots/REVISION
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_KEYS = ("license", "license_name", "license_link")


def base_model_of(seed: str | Path, given: str | None) -> str | None:
    """Name of a seed on the Hub, OWNER/NAME: the given one, or that of a directory in the cache of
    the Hub's library; None if neither is known."""
    if given is not None:
        if not _NAME.fullmatch(given):
            raise UserError(f"base_model is the seed's name on the Hub, OWNER/NAME; got {given!r}")
        return given
    found = _CACHED.search(Path(seed).absolute().as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def origin_facts(run: Run) -> dict[str, str]:
    """Name of the seed on the Hub and its licence, as far as they are known from the front matter
    of the seed's README.md or from a file of terms beside the weights."""
    name = run.record.get("base_model")
    return ({"base_model": name} if name else {}) | licence_of(run.seed)


def licence_of(seed: Path) -> dict[str, str]:
    """Licence of a checkpoint, as entries of the front matter of a card on the Hub; empty if no
    file beside the checkpoint states it."""
    metadata = {}
    if (seed / README).is_file():
        try:
            metadata = metadata_load(seed / README) or {}
        except Exception as error:  # YAML's errors have no common type with the Hub's
            message = f"{seed / README} has a front matter that is no YAML: {first_line(error)}"
            raise UserError(message) from error
    if metadata.get("license"):
        return {key: str(metadata[key]) for key in _LICENCE_KEYS if metadata.get(key)}
    files = sorted(p.name for p in seed.iterdir() if p.name.lower().startswith(LICENCES[:2]))
    if not files:
        return {}
    # How the Hub writes terms that have no identifier there.
    return {"license": "other", "license_link": files[0], "license_name": "that-of-the-seed"}
