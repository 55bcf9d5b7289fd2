"""Reads corpora, and reports what was read and what was left out."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xelm.data.contents import Contents, contents_of
from xelm.data.corpus import AnyCorpus
from xelm.data.corpus_files import describe
from xelm.data.data_card import card_of, read_card
from xelm.data.parts import Document, Survey
from xelm.data.unusable import UnusableRecords


def read(
    corpus: AnyCorpus, unusable: UnusableRecords, languages: Sequence[str] | None = None
) -> Iterator[Document]:
    """Every usable document of a corpus in these languages (None: all), part by part."""
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

    def origins(self) -> dict[str, Any]:
        """Language -> origin of its text, as JSON: number of files, `Contents.fingerprint`, and for
        each source and data card the numbers of files and of documents that were read, copies
        included; "card" is None where there is no card."""
        groups: dict[str, dict[tuple[str, Path | None], list[int]]] = {}
        for part, survey in zip(self.contents.parts, self.surveys):
            for tag, count in survey.documents.items():
                place = part.source.path, card_of(part, tag)
                group = groups.setdefault(tag, {}).setdefault(place, [0, 0])
                group[0] += 1
                group[1] += count
        return {
            tag: {
                "files": sum(files for files, _ in group.values()),
                "sha256": self.contents.fingerprint([tag]),
                "sources": [
                    {
                        "source": source,
                        "files": files,
                        "read": read,
                        "card": path and read_card(path).to_json(),
                    }
                    for (source, path), (files, read) in group.items()
                ],
            }
            for tag, group in groups.items()
        }

    def table(self) -> str:
        """Table for people with a row for each language of each file or group of files: name,
        language, documents, records left out; then the files that were skipped."""
        groups: dict[tuple[str, str | None], list[tuple[str, Survey]]] = {}
        for part, survey in zip(self.contents.parts, self.surveys):
            folder, _, name = part.name.rpartition("/")
            shards = f"{folder}/" if folder else re.sub(r"\d+", "", name)
            group = groups.setdefault((shards, part.language if part.named else None), [])
            group.append((part.name, survey))
        rows = [("read from", "language", "documents", "left out")]
        for group in groups.values():
            name = group[0][0] + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            documents: Counter[str] = Counter()
            for _, survey in group:
                documents.update(survey.documents)
            left_out = sum(survey.unusable.total() for _, survey in group)
            for tag, count in documents.items() or [("–", 0)]:
                rows.append((name, tag, f"{count:,}", f"{left_out:,}"))
                name, left_out = "", 0
        width, tag_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{a:{width}}  {b:{tag_width}}{c:>13}{d:>12}" for a, b, c, d in rows]
        skipped = describe(self.contents.skipped)
        return "\n".join([*lines, *([skipped] if skipped else [])])
