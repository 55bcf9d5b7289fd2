"""What is known of the text of each language: how well the tokenizer spells it, and how much of it
stands in the text that a RUN was trained on. Imports no JAX."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from xelm.data.coverage import MAX_UNKNOWN_SHARE
from xelm.data.duplicates import Fingerprints, overlap
from xelm.data.store import Store
from xelm.runs.run import Run

EVALUATION = "evaluation-"
"""How names of stores of evaluated text begin."""
MOST_TRAINED = 0.01
"""Share of a language's documents in the training text from which on figures are marked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageText:
    """The text of one language. Counts are None where a store of an earlier version lacks them."""

    language: str
    documents: int
    tokens: int
    """Special tokens not counted."""
    bytes: int
    """UTF-8."""
    characters: int | None = None
    visible_characters: int | None = None
    """Those that are no white space."""
    unknown_characters: int | None = None
    """Visible ones that the tokenizer does not know."""
    byte_tokens: int | None = None
    """Tokens that are only a part of a character."""
    duplicates: int | None = None
    """Documents that were exact copies of earlier ones, left out or not."""
    compared: int | None = None
    """Documents that were compared with the training text; None where none were, or could be."""
    exact: int | None = None
    """Of those, how many stand there exactly as they are."""
    near: int | None = None
    """Of those, how many have only a near copy there."""

    @classmethod
    def of(cls, store: Store, language: str) -> "LanguageText":
        """What a store says."""
        counts = store.record["languages"][language]
        known = {field.name: counts[field.name] for field in fields(cls) if field.name in counts}
        return cls(language=language, **known)

    @property
    def tokens_per_character(self) -> float | None:
        """Of all characters."""
        return _share(self.tokens, self.characters)

    @property
    def unknown_share(self) -> float | None:
        """Share of the visible characters that are unknown to the tokenizer."""
        return _share(self.unknown_characters, self.visible_characters)

    @property
    def byte_share(self) -> float | None:
        """Share of the tokens that are only a part of a character."""
        return _share(self.byte_tokens, self.tokens)

    @property
    def trained_share(self) -> float | None:
        """Share of the documents compared that stand in the training text, or have a near copy."""
        if self.exact is None or self.near is None:
            return None
        return _share(self.exact + self.near, self.compared)

    @property
    def unspelled(self) -> bool:
        """Whether so much is unknown that a likelihood says nothing."""
        return (self.unknown_share or 0.0) > MAX_UNKNOWN_SHARE

    @property
    def trained(self) -> bool:
        """Whether so much stands in the training text that figures are not of held-out text."""
        return (self.trained_share or 0.0) > MOST_TRAINED

    @property
    def marks(self) -> str:
        """What figures of this language are marked with: `?` unspelled, `!` trained on."""
        return "?" * self.unspelled + "!" * self.trained

    def to_json(self) -> dict[str, Any]:
        """As in results.json, with shares."""
        shares = ("tokens_per_character", "unknown_share", "byte_share", "trained_share")
        return asdict(self) | {name: getattr(self, name) for name in shares}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LanguageText":
        """From an entry of results.json."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})


def texts_of(store: Store) -> dict[str, LanguageText]:
    """What a store says of its languages."""
    return {tag: LanguageText.of(store, tag) for tag in store.languages}


def compared(
    run: Run, store: Store, max_documents: int | None = None
) -> tuple[dict[str, LanguageText], list[str]]:
    """The text of an evaluation, by language, compared with all that the RUN was trained on: the
    seed's and the experts' text, and that of grown experts. And the training stores that could not
    be compared with, since an earlier version kept nothing to compare by."""
    found, mine = texts_of(store), store.fingerprints()
    training = list(_training_stores(run))
    lacking = [known.directory.name for known in training if known.fingerprints() is None]
    others = [prints for known in training for prints in (known.fingerprints() or {}).values()]
    if mine is None or lacking:
        return found, lacking
    parts = {
        tag: Fingerprints(*(np.asarray(part[:max_documents]) for part in prints))
        for tag, prints in mine.items()
    }
    whole = overlap(Fingerprints(*map(np.concatenate, zip(*parts.values()))), others)
    ends = np.cumsum([len(prints.hashes) for prints in parts.values()])[:-1]
    for tag, exact, near in zip(parts, np.split(whole.exact, ends), np.split(whole.near, ends)):
        record = found[tag].to_json()
        record |= {"compared": len(exact), "exact": int(exact.sum()), "near": int(near.sum())}
        found[tag] = LanguageText.from_json(record)
    return found, []


def warnings(texts: Mapping[str, LanguageText]) -> list[str]:
    """One line for each kind of text whose figures are marked."""
    lines = []
    unspelled = {tag: text.unknown_share for tag, text in texts.items() if text.unspelled}
    if unspelled:
        lines.append(
            f"characters unknown to the tokenizer: {_percents(unspelled)}. A model that reads "
            "unknown tokens predicts them easily: perplexity and bits per byte say nothing there, "
            "are marked ?, are in no mean and never the best"
        )
    trained = {tag: text.trained_share for tag, text in texts.items() if text.trained}
    if trained:
        lines.append(
            f"documents that stand in the text this RUN was trained on, as they are or nearly so: "
            f"{_percents(trained)}. Figures there are not of held-out text, and are marked !"
        )
    return lines


def duplicate_notes(texts: Mapping[str, LanguageText], left_out: bool) -> list[str]:
    """A line that tells how many documents are exact copies, if any are."""
    found = {tag: text.duplicates for tag, text in texts.items() if text.duplicates}
    if not found:
        return []
    which = ", ".join(f"{tag} {count:,}" for tag, count in found.items())
    count = sum(found.values())
    done = "left out" if left_out else "kept"
    what = "1 document is an exact copy" if count == 1 else f"{count:,} documents are exact copies"
    return [f"{what} of earlier ones ({which}); {done}"]


def _training_stores(run: Run) -> Iterator[Store]:
    """The RUN's corpus and those of the grown experts in its registry. A growth that was ended
    before its training began has left text that nothing was trained on."""
    grown = {tag for e in run.registry().experts if e.cluster is None for tag in e.languages}
    for name in ("train", *sorted(grown)):
        if (run.directory / "corpus" / name / "store.json").exists():
            yield run.store(name)


def _percents(shares: Mapping[str, float | None]) -> str:
    return ", ".join(f"{tag} {share or 0:.1%}" for tag, share in shares.items())


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole
