"""Data cards: YAML files beside a corpus that say where its text is from and how it may be used.

A card lies in a folder of the corpus, as `data-card.yaml` for all of its text or as
`<language>.card.yaml` for one language, or is named by `card:` in a description of the corpus. Of
several, the one of the language counts before that of all, and an inner folder before an outer one.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from clustering.errors import UserError
from xelm.data.corpus import Source, read_yaml
from xelm.data.parts import Part, tag_of

GENERAL = "data-card.yaml"
ENDING = ".card.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCard:
    """What the owner of a text says of it; at least one field."""

    licence: str | None = None
    """Licence, such as CC-BY-4.0."""
    source: str | None = None
    """Where the text is from."""
    consent: str | None = None
    """Who agreed to this use of it, and how."""
    usage: str | None = None
    """What it may be used for, and what not."""
    contact: str | None = None
    """Whom to write to."""

    def to_json(self) -> dict[str, str]:
        """The fields that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_card(path: Path) -> DataCard:
    """The data card of a YAML file; UserError for unknown keys, and for values that are no text."""
    found, known = read_yaml(path), [field.name for field in fields(DataCard)]
    if not isinstance(found, dict) or not found:
        raise UserError(
            f"{path} must have lines such as 'licence: CC0-1.0'; known are {', '.join(known)}; got "
            f"{found!r:.80}"
        )
    for name, value in found.items():
        if name not in known:
            raise UserError(f"{path}: a data card has no {name!r}; it has {', '.join(known)}")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{path}: {name} must be a text; got {value!r:.80}")
    return DataCard(**{name: value.strip() for name, value in found.items()})


def is_card(name: str) -> bool:
    """Whether a file's name is that of a data card."""
    return name == GENERAL or name.endswith(ENDING)


def card_of(part: Part, language: str) -> Path | None:
    """The file with the data card of a language's text in a part of a corpus; None without one.
    UserError for one that a description names and that is not there."""
    source: Source = part.source
    if source.card is not None:
        if not Path(source.card).is_file():
            raise UserError(f"the data card {source.card} of {source.path} is not there")
        return Path(source.card)
    if not isinstance(part.location, Path):
        return None
    inside = part.name.count("/")
    for folder in list(part.location.parents)[: inside + 1]:
        cards = sorted(path for path in folder.glob(f"*{ENDING}") if path.is_file())
        own = [path for path in cards if tag_of(path.name.removesuffix(ENDING)) == language]
        general = folder / GENERAL
        if own or general.is_file():
            return own[0] if own else general
    return None
