"""Parts of a corpus: one file or Hub data set each, with its documents and its hash.

Every record that cannot be used is counted by reason with the first places. None stops the reading,
and none is lost unreported.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.corpus import Source
from xelm.data.records import format_of, records
from xelm.data.unicode import normalised, surrogate_in
from xelm.data.unusable import UnusableRecords

# Number of records that are searched for a language field, in files whose names are no language.
_FIRST_RECORDS = 100


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    text: str
    """Text in Unicode NFC."""
    language: str
    """Canonical BCP 47 tag, from the record or else from the file's name."""


def no_documents(languages: Sequence[str], unusable: UnusableRecords) -> UserError:
    """The error for a corpus without usable documents in `languages`."""
    what = ", ".join(languages) or "any language"
    more = f"; {unusable}" if unusable else ""
    if any(reason.startswith('no "') for reason in unusable.counts):
        more += "; other fields are named with --text-field and --language-field"
    return UserError(f"the corpus has no usable document in {what}{more}")


@dataclass(frozen=True, slots=True)
class Part:
    """One file or Hub data set of a corpus, which can be read wherever the text is found."""

    location: Path | str
    """Path of the file, or address of the data set."""
    language: str | None = None
    """Language of records that name none: a canonical tag, or a name that is no language."""
    languages: Sequence[str] | None = None
    """Canonical tags of the languages to read; None means all."""
    name: str = ""
    """The file's path within the corpus, for people."""
    source: Source = field(default_factory=lambda: Source(path="."))
    """Source to which it belongs, with the fields and languages of records."""
    named: bool = True
    """Whether `language` is a language; otherwise records' field `language` is read, too."""

    def documents(self, unusable: UnusableRecords) -> Iterator[Document]:
        """Every usable document in the languages to read; all others are counted in `unusable`."""
        for place, document in self.all_documents(unusable):
            if self.languages is None or document.language in self.languages:
                yield document
            else:
                unusable.add(f"language {document.language}, which was not requested", place)

    def all_documents(self, unusable: UnusableRecords) -> Iterator[tuple[str, Document]]:
        """Every usable document in any language, after its place; the others are counted."""
        for place, record in self._records(unusable):
            document = self._document(place, record, unusable)
            if document is not None:
                yield place, document

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Text and language of every usable document in the languages to read."""
        return ((found.text, found.language) for found in self.documents(UnusableRecords()))

    def first_language(self) -> str | None:
        """The first language that one of the first hundred records names, as a canonical tag if
        possible; None if none names any. Unusable records are not counted."""
        for _place, record in itertools.islice(self._records(UnusableRecords()), _FIRST_RECORDS):
            value = self._language_value(record)
            if isinstance(value, str):
                code = self.source.languages.get(value, value)
                return (code and tag_of(code)) or value
        return None

    def digest(self) -> bytes:
        """SHA-256 of the file, or the address of the data set."""
        if isinstance(self.location, str):
            return self.location.encode()
        with self.location.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _records(self, unusable: UnusableRecords) -> Iterator[tuple[str, Any]]:
        columns = [*self._text_fields(), *self._language_fields()]
        return records(self.location, self.name, unusable, columns=columns, unit=self.source.unit)

    def _text_fields(self) -> tuple[str, ...]:
        """Fields that may contain the text; the first that a record has counts."""
        if isinstance(self.location, Path):
            ending, _ = format_of(self.location.name) or ("", "")
            if ending == ".txt":  # for which `records` makes the field
                return ("text",)
        return (self.source.text_field,) if self.source.text_field else ("text", "content")

    def _language_fields(self) -> tuple[str, ...]:
        """Fields that may name a record's language; the first that has a value counts."""
        if self.source.language_field:
            return (self.source.language_field,)
        return ("lang",) if self.named else ("lang", "language")

    def _language_value(self, record: Any) -> Any:
        """Value of the field that names a record's language; None if there is none."""
        if self.source.language or not isinstance(record, dict):
            return None
        return next((record[name] for name in self._language_fields() if record.get(name)), None)

    def _document(self, place: str, record: Any, unusable: UnusableRecords) -> Document | None:
        """The document of a record; None if it cannot be used, which is counted."""
        if not isinstance(record, dict):
            return unusable.add("no object", place)
        names = self._text_fields()
        text = next((record[name] for name in names if name in record), None)
        value = self._language_value(record)
        language = self.language if value is None else value
        if isinstance(value, str):
            language = self.source.languages.get(value, value)
        if not isinstance(text, str):
            return unusable.add(f'no "{names[0]}"', place)
        if not text.strip():
            return unusable.add("empty text", place)
        if surrogate_in(text) is not None:
            return unusable.add("half of a surrogate pair", place)
        if "\0" in text:
            # No text has it: it belongs to another encoding, or to bytes that are no text.
            return unusable.add("the character U+0000", place)
        if language is None and value is not None:
            return unusable.add("a language that the map leaves out", f"{place} {value!r}")
        if not isinstance(language, str):
            return unusable.add(f'no "{self.source.language_field or "lang"}"', place)
        tag = tag_of(language)
        if tag is None:
            # The value belongs to the place: there may be as many values as records.
            return unusable.add("an unknown language", f"{place} {language[:40]!r}")
        if self.language and self.language.startswith(f"{tag}-"):
            tag = self.language  # as for records of `srp` in a folder `srp_Latn`
        return Document(normalised(text.strip()), tag)


@dataclass(slots=True)
class Survey:
    """Counts of one reading of a part."""

    documents: Counter[str] = field(default_factory=Counter)
    """Language -> number of usable documents in the languages to read."""
    unusable: UnusableRecords = field(default_factory=UnusableRecords)
    """Records that were left out."""
    digest: bytes = b""
    """`Part.digest`; empty where it was not needed."""

    @staticmethod
    def of(part: Part) -> "Survey":
        """Reads a part to its end and hashes it."""
        found = Survey(digest=part.digest())
        deque(found.read(part), maxlen=0)
        return found

    def read(self, part: Part) -> Iterator[Document]:
        """Every usable document of a part; counts them on the way."""
        for document in part.documents(self.unusable):
            self.documents[document.language] += 1
            yield document


@lru_cache(4096)
def tag_of(language: str) -> str | None:
    """The canonical tag of a language code; None for an unknown one."""
    try:
        return canonical(language)
    except UserError:
        return None
