"""The texts of one part of a corpus: a file or a data set of the Hub, its documents, its hash.

Knows which fields of a record are its text and its language. Every record that cannot be used is
counted by reason with the first places; none stops the reading and none vanishes unreported.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.corpus import Source
from xelm.data.records import format_of, records
from xelm.data.unicode import normalised
from xelm.data.unusable import UnusableRecords

# Records of a file whose name is no language in which a field that says it is looked for.
_FIRST_RECORDS = 100


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    text: str
    """Unicode NFC."""
    language: str
    """Canonical BCP 47 tag of what the record, or else the file's name, says."""


def no_documents(languages: Sequence[str], faults: UnusableRecords) -> UserError:
    """The mistake of a corpus without usable documents in `languages`, and what was left out."""
    what = ", ".join(languages) or "any language"
    more = f"; {faults}" if faults else ""
    if any(reason.startswith('no "') for reason in faults.counts):
        more += "; other fields are named with --text-field and --language-field"
    return UserError(f"the corpus has no usable document in {what}{more}")


@dataclass(frozen=True, slots=True)
class Part:
    """The texts of one corpus file or Hub data set, told by where they lie: to be read any number
    of times, on any machine that finds them there."""

    where: Path | str
    """The file, or the address of the data set."""
    language: str | None = None
    """Of records that do not say it: a canonical tag, or a name that is none."""
    wanted: Sequence[str] | None = None
    """Canonical tags of the languages to keep; None means all."""
    name: str = ""
    """The file's path within the corpus, for people."""
    source: Source = field(default_factory=lambda: Source(path="."))
    """How records are read."""
    named: bool = True
    """Whether `language` is one, and the records' `language` need not be looked at."""

    def documents(self, faults: UnusableRecords) -> Iterator[Document]:
        """Every usable document in any language; unusable records are counted in `faults`."""
        return _documents(self, self._records(faults), faults)

    def _records(self, faults: UnusableRecords) -> Iterator[tuple[str, Any]]:
        columns = [*self.text_fields(), *self.source.language_fields(named=self.named)]
        return records(self.where, self.name, faults, columns=columns, unit=self.source.unit)

    def text_fields(self) -> tuple[str, ...]:
        """Fields that may hold the text; of a plain text file, that which its reader makes."""
        plain = isinstance(self.where, Path) and (format_of(self.where.name) or "")[:1] == (".txt",)
        return ("text",) if plain else self.source.text_fields()

    def first_language(self) -> str | None:
        """What the first record that says its language says, as a canonical tag if it is one; None
        if none of the first hundred does. UnusableRecords are not counted."""
        for _place, record in itertools.islice(self._records(UnusableRecords()), _FIRST_RECORDS):
            said = _said(self, record)
            if isinstance(said, str):
                code = self.source.languages.get(said, said)
                return (code and tag_of(code)) or said
        return None

    def digest(self) -> bytes:
        """SHA-256 of the file, or the address of the data set."""
        if isinstance(self.where, str):
            return self.where.encode()
        with self.where.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Text and language of every usable document in the languages wanted."""
        for document in self.documents(UnusableRecords()):
            if self.wanted is None or document.language in self.wanted:
                yield document.text, document.language


@dataclass(frozen=True, slots=True)
class Survey:
    """What one reading tells of a part of a corpus."""

    documents: Mapping[str, int]
    """Language -> usable documents, of those wanted."""
    faults: UnusableRecords
    digest: bytes

    @staticmethod
    def of(texts: Part) -> "Survey":
        """Reads it."""
        counts: dict[str, int] = {}
        faults = UnusableRecords()
        for document in texts.documents(faults):
            if texts.wanted is None or document.language in texts.wanted:
                counts[document.language] = counts.get(document.language, 0) + 1
        return Survey(counts, faults, texts.digest())


def _documents(
    texts: Part, records: Iterator[tuple[str, Any]], faults: UnusableRecords
) -> Iterator[Document]:
    text_fields = texts.text_fields()
    for place, record in records:
        if not isinstance(record, dict):
            faults.add("no object", place)
            continue
        text = next((record[name] for name in text_fields if name in record), None)
        said = _said(texts, record)
        language = texts.language if said is None else _mapped(texts, said)
        if not isinstance(text, str):
            faults.add(f'no "{text_fields[0]}"', place)
        elif not text.strip():
            faults.add("empty text", place)
        elif not _is_unicode(text):
            faults.add("half of a surrogate pair", place)
        elif "\0" in text:
            # No text has it: it is that of another encoding, or of bytes that are no text.
            faults.add("the character U+0000", place)
        elif language is None and said is not None:
            faults.add("a language that the map leaves out", f"{place} {said!r}")
        elif not isinstance(language, str):
            faults.add(f'no "{texts.source.language_field or "lang"}"', place)
        elif (tag := tag_of(language)) is None:
            # The value belongs to the place: there may be as many as records.
            faults.add("an unknown language", f"{place} {language[:40]!r}")
        else:
            if texts.language and texts.language.startswith(f"{tag}-"):
                tag = texts.language  # as of records of `srp` in a folder `srp_Latn`
            yield Document(normalised(text.strip()), tag)


def _said(texts: Part, record: Any) -> Any:
    """The value of the field that says a record's language; None if there is none."""
    if texts.source.language or not isinstance(record, dict):
        return None
    fields = texts.source.language_fields(named=texts.named)
    return next((record[name] for name in fields if record.get(name)), None)


def _mapped(texts: Part, said: Any) -> Any:
    return texts.source.languages.get(said, said) if isinstance(said, str) else said


@lru_cache(4096)
def tag_of(language: str) -> str | None:
    """The canonical tag of a language code; None if it is none."""
    try:
        return canonical(language)
    except UserError:
        return None


def _is_unicode(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which is no character and cannot be encoded.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
