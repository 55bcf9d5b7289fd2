"""Reads corpora, and says what was read and what was left out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from xelm.data.contents import Contents, contents_of
from xelm.data.corpus import AnyCorpus
from xelm.data.corpus_files import describe
from xelm.data.parts import Document, Survey
from xelm.data.unusable import UnusableRecords


def read(
    corpus: AnyCorpus, unusable: UnusableRecords, languages: Sequence[str] | None = None
) -> Iterator[Document]:
    """Every usable document of a corpus in these languages (None: all), part by part; records that
    are left out are counted in `unusable`."""
    return Reading(contents_of(corpus, languages), unusable).documents()


@dataclass(slots=True)
class Reading:
    """One reading of a corpus, which counts what it finds in each part."""

    contents: Contents
    unusable: UnusableRecords = field(default_factory=UnusableRecords)
    """Records that were left out, of all parts that were read to their end."""
    surveys: list[Survey] = field(default_factory=list)
    """Counts of each part that was begun."""

    def documents(self) -> Iterator[Document]:
        """Every usable document, in the order of the parts."""
        for part in self.contents.parts:
            survey = Survey()
            self.surveys.append(survey)
            yield from survey.read(part)
            self.unusable.include(survey.unusable)

    def table(self) -> str:
        """The number of documents by file and language, and what was skipped, for people."""
        return reading_table(self.contents, self.surveys)


def reading_table(contents: Contents, surveys: Sequence[Survey]) -> str:
    """Table for people with a row for each language of each file or group of files: name, language,
    documents, records left out; then the files that were skipped. surveys: counts of the first
    parts."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, part in enumerate(contents.parts[: len(surveys)]):
        folder, _, name = part.name.rpartition("/")
        shards = f"{folder}/" if folder else re.sub(r"\d+", "", name)
        groups.setdefault((shards, part.language if part.named else None), []).append(number)
    rows = [("read from", "language", "documents", "left out")]
    for numbers in groups.values():
        name = contents.parts[numbers[0]].name
        name += f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        documents: dict[str, int] = {}
        for number in numbers:
            for tag, count in surveys[number].documents.items():
                documents[tag] = documents.get(tag, 0) + count
        left_out = sum(surveys[number].unusable.total() for number in numbers)
        for tag, count in documents.items() or [("–", 0)]:
            rows.append((name, tag, f"{count:,}", f"{left_out:,}"))
            name, left_out = "", 0
    width, tag_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{a:{width}}  {b:{tag_width}}{c:>13}{d:>12}" for a, b, c, d in rows]
    skipped = describe(contents.skipped)
    return "\n".join([*lines, *([skipped] if skipped else [])])
