"""Reads corpora: folders of JSONL (plain, gz, zst) or Parquet, single files, Hub data sets.

Every record that cannot be used is counted by reason with the first places; none stops the reading
and none vanishes unreported.
"""

import contextlib
import gzip
import hashlib
import io
import json
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from clustering.errors import UserError
from clustering.languages import canonical

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# A line beyond this is no document but a broken file, and would have to be held in memory whole.
LONGEST_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    text: str
    """Unicode NFC."""
    language: str
    """Canonical BCP 47 tag of what the record's "lang", or else the file's name, says."""


@dataclass(slots=True)
class Faults:
    """What a reading could not use: how many records by reason, and the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Counts one unusable record at `place` ("file:line")."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(place)

    def include(self, other: "Faults") -> None:
        """Counts those of another reading as well."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            places = self.places.setdefault(reason, [])
            places += other.places[reason][: 3 - len(places)]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        parts = [
            f"{count} with {reason} (first: {', '.join(self.places[reason])})"
            for reason, count in self.counts.items()
        ]
        return f"{sum(self.counts.values())} records left out: {'; '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Counts and first places, for the record of a reading."""
        return {
            reason: {"count": count, "first": self.places[reason]}
            for reason, count in self.counts.items()
        }


def no_documents(languages: Sequence[str], faults: Faults) -> UserError:
    """The mistake of a corpus without usable documents in `languages`, and what was left out."""
    what = ", ".join(languages) or "any language"
    more = f"; {faults}" if faults else ""
    return UserError(f"the corpus has no usable document in {what}{more}")


def address(corpus: str | Path) -> str:
    """Where a corpus lies, wherever it is asked from: an absolute path, or a name on the Hub."""
    return str(corpus) if str(corpus).startswith("hf://") else str(Path(corpus).resolve())


def languages_of(corpus: str | Path) -> list[str]:
    """The languages that the names of a folder's files declare, each once."""
    return list(dict.fromkeys(language_of(path) for path in files(corpus)))


def files(corpus: str | Path) -> list[Path]:
    """The corpus files of a folder, sorted, or the one file that `corpus` names."""
    path = Path(corpus)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is no corpus file; wanted {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"corpus {path} does not exist")
    found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
    if not found:
        raise UserError(f"{path} holds no corpus file; wanted <language>{' or '.join(SUFFIXES)}")
    return found


def language_of(path: Path) -> str:
    """The language a file's name declares: `sw` for `sw.jsonl.gz`."""
    return path.name.split(".")[0]


def fingerprint(corpus: str | Path, languages: Sequence[str] | None = None) -> str:
    """SHA-256 over names and contents of the corpus files that `read` would read, or over the name
    of a Hub data set."""
    found = parts(corpus, languages)
    return fingerprint_of(found, [part.digest() for part in found])


def fingerprint_of(parts: "Sequence[Texts]", digests: Sequence[bytes]) -> str:
    """The fingerprint of a corpus of these parts, with these digests."""
    whole = hashlib.sha256()
    for part, digest in zip(parts, digests):
        if isinstance(part.where, Path):
            whole.update(part.where.name.encode() + b"\0")
        whole.update(digest)
    return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one corpus file or Hub data set, told by where they lie: to be read any number
    of times, on any machine that finds them there."""

    where: Path | str
    """The file, or `hf://` and the name of the data set."""
    language: str | None = None
    """Of records that do not say it."""
    wanted: Sequence[str] | None = None
    """Canonical tags of the languages to keep; None means all."""

    def documents(self, faults: Faults) -> Iterator[Document]:
        """Every usable document in any language; unusable records are counted in `faults`."""
        if isinstance(self.where, str):
            records = _hub_records(self.where)
        elif self.where.name.endswith(".parquet"):
            records = _parquet_records(self.where, faults)
        else:
            records = _json_records(self.where, faults)
        return _documents(records, faults, self.language)

    def digest(self) -> bytes:
        """SHA-256 of the file, or the name of the data set."""
        if isinstance(self.where, str):
            return self.where.encode()
        with self.where.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Text and language of every usable document in the languages wanted."""
        for document in self.documents(Faults()):
            if self.wanted is None or document.language in self.wanted:
                yield document.text, document.language


def parts(corpus: str | Path, languages: Sequence[str] | None = None) -> list[Texts]:
    """What a corpus consists of: files, each of which can be read by itself. Of a folder, those
    named for other languages than `languages` are left out.

    `corpus` is a folder of `<language>.jsonl[.gz|.zst]` or `<language>.parquet` files, one such
    file (its records then carry "lang"), or `hf://owner/dataset[/config][:split]`, of which the
    split is "train" by default.
    """
    if str(corpus).startswith("hf://"):
        return [Texts(str(corpus), wanted=languages)]
    # A file given by itself may hold many languages; its name says nothing then.
    single = Path(corpus).is_file()
    return [
        Texts(path.absolute(), None if single else language_of(path), languages)
        for path in _wanted(corpus, languages)
    ]


def read(
    corpus: str | Path, faults: Faults, languages: Sequence[str] | None = None
) -> Iterator[Document]:
    """Every usable document of the `parts`, in their order; unusable records are counted in
    `faults`."""
    for part in parts(corpus, languages):
        yield from part.documents(faults)


@dataclass(frozen=True, slots=True)
class Survey:
    """What one reading tells of a part of a corpus."""

    documents: Mapping[str, int]
    """Language -> usable documents, of those wanted."""
    faults: Faults
    digest: bytes

    @staticmethod
    def of(texts: Texts) -> "Survey":
        """Reads it."""
        counts: dict[str, int] = {}
        faults = Faults()
        for document in texts.documents(faults):
            if texts.wanted is None or document.language in texts.wanted:
                counts[document.language] = counts.get(document.language, 0) + 1
        return Survey(counts, faults, texts.digest())


def _wanted(corpus: str | Path, languages: Sequence[str] | None) -> list[Path]:
    found = files(corpus)
    if languages is None or Path(corpus).is_file():
        return found
    tags = {path: _tag({}, language_of(path)) for path in found}
    missing = [language for language in languages if language not in tags.values()]
    if missing:
        raise UserError(f"{corpus} has no file of {', '.join(missing)}")
    return [path for path, tag in tags.items() if tag in languages]


def _documents(
    records: Iterator[tuple[str, Any]], faults: Faults, default_language: str | None
) -> Iterator[Document]:
    tags: dict[str, str] = {}
    for place, record in records:
        if not isinstance(record, dict):
            faults.add("no object", place)
            continue
        text, language = record.get("text"), record.get("lang") or default_language
        if not isinstance(text, str):
            faults.add('no "text"', place)
        elif not text.strip():
            faults.add("empty text", place)
        elif not _is_unicode(text):
            faults.add("half of a surrogate pair", place)
        elif not isinstance(language, str):
            faults.add('no "lang"', place)
        elif (tag := tags.get(language) or _tag(tags, language)) is None:
            # The value belongs to the place: there may be as many as records.
            faults.add("an unknown language", f"{place} {language[:40]!r}")
        else:
            yield Document(unicodedata.normalize("NFC", text.strip()), tag)


def _is_unicode(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which is no character and cannot be encoded.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tag(tags: dict[str, str], language: str) -> str | None:
    try:
        return tags.setdefault(language, canonical(language))
    except UserError:
        return None


def _json_records(path: Path, faults: Faults) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with opened(path) as file:
            while line := file.readline(LONGEST_LINE_BYTES):
                number += 1
                place = f"{path.name}:{number}"
                if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                    faults.add("a line over 64 MiB", place)
                    _skip_line(file)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield place, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    faults.add("bytes that are not UTF-8", place)
                except (ValueError, RecursionError):
                    faults.add("broken JSON", place)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of what was compressed
        faults.add(f"a damaged file ({error})", f"{path.name} after line {number}")


def _skip_line(file: BinaryIO) -> None:
    while piece := file.readline(LONGEST_LINE_BYTES):
        if piece.endswith(b"\n"):
            return


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of bytes, unpacked if its name ends in .gz or .zst."""
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".gz"):
            yield stack.enter_context(gzip.open(path, "rb"))
        elif path.name.endswith(".zst"):
            import pyarrow

            # Unlike the reader of `zstandard`, it tells a file that was cut short from a whole one.
            compressed = stack.enter_context(path.open("rb"))
            yield io.BufferedReader(
                stack.enter_context(pyarrow.CompressedInputStream(compressed, "zstd"))
            )
        else:
            yield stack.enter_context(path.open("rb"))


def _parquet_records(path: Path, faults: Faults) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in ("text", "lang") if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for record in _rows(batch):
                    number += 1
                    place = f"{path.name}:{number}"
                    if record is None:
                        faults.add("bytes that are not UTF-8", place)
                    else:
                        yield place, record
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of the pages
        faults.add(f"a damaged file ({_reason(error)})", f"{path.name} after row {number}")


def _rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one with bytes that are not UTF-8, which Parquet lets pass."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]


def _hub_records(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    path, colon, split = name.removeprefix("hf://").partition(":")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts) or (colon and not split):
        raise UserError(f"a Hub corpus is hf://owner/dataset[/config][:split]; got {name}")
    dataset = "/".join(parts[:2])
    try:
        records = datasets.load_dataset(dataset, *parts[2:], split=split or "train", streaming=True)
    except Exception as error:
        raise UserError(f"cannot open {name}: {_reason(error)}") from error
    # Without "lang" in the records the config's name is the language, as in many collections.
    language = parts[2] if len(parts) == 3 else None
    number = 0
    try:
        for number, record in enumerate(records, 1):
            yield f"{name}:{number}", {"lang": language, **record} if language else record
    except Exception as error:
        # Going on would make a corpus of whatever came before the connection broke.
        raise UserError(f"cannot read {name} after record {number}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
