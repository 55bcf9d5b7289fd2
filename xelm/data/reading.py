"""Reads corpora: every usable document, and counts of what each part contains."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xelm.data.contents import Contents, contents_of
from xelm.data.corpus import AnyCorpus
from xelm.data.corpus_files import describe
from xelm.data.parts import Document
from xelm.data.unusable import UnusableRecords


def read(
    corpus: AnyCorpus, faults: UnusableRecords, languages: Sequence[str] | None = None
) -> Iterator[Document]:
    """Every usable document of the `parts`, in their order; unusable records are counted in
    `faults`."""
    yield from Reading(contents_of(corpus, languages), faults).documents()


@dataclass(slots=True)
class Reading:
    """One reading of a corpus, which counts what it finds in each part."""

    plan: Contents
    faults: UnusableRecords
    counts: list[Mapping[str, int]] = field(default_factory=list)
    """Language -> usable documents, of each part that was read."""
    left_out: list[int] = field(default_factory=list)
    """Unusable records of each part that was read."""

    def documents(self) -> Iterator[Document]:
        """Every usable document, in the order of the parts."""
        for part in self.plan.parts:
            counts: dict[str, int] = {}
            self.counts.append(counts)
            self.left_out.append(0)
            documents = part.documents(self.faults)
            while True:
                # Whoever takes the documents may count some of them as faults too.
                before = self.faults.total()
                document = next(documents, None)
                self.left_out[-1] += self.faults.total() - before
                if document is None:
                    break
                counts[document.language] = counts.get(document.language, 0) + 1
                yield document

    def table(self) -> str:
        """The number of documents by file and language, and what was skipped, for people."""
        return reading_table(self.plan, self.counts, self.left_out)


def reading_table(
    plan: Contents, counts: Sequence[Mapping[str, int]], left_out: Sequence[int]
) -> str:
    """A row for each language of each file or group of files: where, language, documents, records
    left out; then the files that were skipped. counts, left_out: of each part of the plan."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, part in enumerate(plan.parts[: len(counts)]):
        folder, _, name = part.name.rpartition("/")
        shards = f"{folder}/" if folder else re.sub(r"\d+", "", name)
        groups.setdefault((shards, part.language if part.named else None), []).append(number)
    rows = [("read from", "language", "documents", "left out")]
    for numbers in groups.values():
        wanted = plan.parts[numbers[0]].wanted
        name = plan.parts[numbers[0]].name
        name += f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        found: dict[str, int] = {}
        for number in numbers:
            for tag, count in counts[number].items():
                found[tag] = found.get(tag, 0) + count
        kept = {tag: count for tag, count in found.items() if wanted is None or tag in wanted}
        lost = sum(left_out[number] for number in numbers)
        lost += sum(found.values()) - sum(kept.values())
        for tag, count in kept.items() or [("–", 0)]:
            rows.append((name, tag, f"{count:,}", f"{lost:,}"))
            name, lost = "", 0
    width, tag_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{a:{width}}  {b:{tag_width}}{c:>13}{d:>12}" for a, b, c, d in rows]
    passed_over = describe(plan.passed_over)
    return "\n".join([*lines, *([passed_over] if passed_over else [])])
