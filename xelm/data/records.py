"""Reads records from files and data sets: JSON lines, Parquet, Arrow, plain text, the Hub.

Every record comes with its place. What cannot be read is counted with its place, and does not stop
the reading. For this reason files are read here, line by line and with pyarrow, and not with
`datasets`, whose readers stop at the first broken line, page or unexpected type.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clustering.errors import first_line
from xelm.data import hub
from xelm.data.unusable import UnusableRecords

LINES = (".jsonl", ".json", ".ndjson", ".txt")
"""Endings of formats with one record or text per line, which may be compressed."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
TABLES = (".parquet", ".arrow")
UNITS = ("paragraph", "line", "file")
# A longer line is a broken file, not a document, and would have to be loaded into memory.
LONGEST_LINE_BYTES = 64 * 2**20
# Length of the beginning of a text file that is searched for a blank line.
_BEGINNING_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Byte order marks of UTF-16, with which no UTF-8 begins.
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

Record = tuple[str, Any]
"""A place such as "sw.jsonl:7", and the record there."""


def format_of(name: str) -> tuple[str, str] | None:
    """Endings of a file's name, as (".jsonl", ".gz"); None for a format that is not read."""
    name = name.lower()
    for compression in ("", *COMPRESSIONS):
        endings = LINES if compression else (*LINES, *TABLES)
        for ending in endings:
            if name.endswith(ending + compression) and len(name) > len(ending + compression):
                return ending, compression
    return None


def stem(name: str) -> str:
    """A file's name without its endings: `fr_clean_0000` of `fr_clean_0000.jsonl.gz`."""
    found = format_of(name)
    return name[: -len("".join(found))] if found else name


def records(
    where: Path | str,
    name: str,
    faults: UnusableRecords,
    *,
    columns: Sequence[str],
    unit: str | None = None,
) -> Iterator[Record]:
    """Every record of a file, or of a data set of the Hub; what cannot be read is counted in
    `faults`. name: name of the file in places. columns: columns of Parquet and Arrow to read. unit:
    as `Source.unit`."""
    if isinstance(where, str):
        yield from hub.records(where)
        return
    if not where.stat().st_size:
        faults.add("an empty file", name)
        return
    ending, _ = format_of(where.name) or ("", "")
    if ending in TABLES:
        yield from _table(where, name, faults, columns, ending)
    elif ending == ".txt":
        yield from _texts(where, name, faults, unit or _unit_of(where))
    else:
        yield from _json(where, name, faults)


def _json(path: Path, name: str, faults: UnusableRecords) -> Iterator[Record]:
    for place, line in _lines(path, name, faults):
        if not line.strip():
            continue
        if line.strip() == b"[":
            faults.add("a JSON array over several lines; wanted one record a line", place)
            return
        try:
            yield place, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults.add("bytes that are not UTF-8", place)
        except (ValueError, RecursionError):
            faults.add("broken JSON", place)


def _texts(path: Path, name: str, faults: UnusableRecords, unit: str) -> Iterator[Record]:
    """The documents of a text file as records, each at the place of its first line."""
    place, size, gathered = "", 0, []
    lines = _lines(path, name, faults)
    for here, line in ((here, line) for here, whole in lines for line in _line_ends(whole)):
        blank = _is_blank(line)
        if gathered and (unit == "line" or (unit == "paragraph" and blank)):
            yield from _text(gathered, size, place, faults)
            gathered, size = [], 0
        if blank and not gathered:
            continue
        place = place if gathered else here
        size += len(line)
        if size < LONGEST_LINE_BYTES:  # nothing more of a longer document has to be kept
            gathered.append(line)
    if gathered:
        yield from _text(gathered, size, place, faults)


def _line_ends(line: bytes) -> Iterator[bytes]:
    """The lines in what was read up to \\n, each ending in \\n instead of \\r\\n or \\r."""
    for part in line.splitlines(keepends=True):
        stripped = part.rstrip(b"\r\n")
        yield stripped if stripped == part else stripped + b"\n"


def _text(lines: list[bytes], size: int, place: str, faults: UnusableRecords) -> Iterator[Record]:
    if size >= LONGEST_LINE_BYTES:
        faults.add("a document over 64 MiB", place)
        return
    try:
        yield place, {"text": b"".join(lines).decode("utf-8")}
    except UnicodeDecodeError:
        faults.add("bytes that are not UTF-8", place)


def _is_blank(line: bytes) -> bool:
    # Long lines are not decoded to find spaces that only Unicode has.
    return not line.strip() or (len(line) < 100 and not line.decode("utf-8", "replace").strip())


def _unit_of(path: Path) -> str:
    """Probable unit of a text file: paragraph if a blank line is near its beginning, else line."""
    with contextlib.suppress(OSError, DamagedFile), opened(path) as file:
        seen = 0
        while (whole := file.readline(_BEGINNING_BYTES)) and seen < _BEGINNING_BYTES:
            for line in _line_ends(whole):
                if seen and _is_blank(line):
                    return "paragraph"
                seen += len(line)
    return "line"


def _lines(path: Path, name: str, faults: UnusableRecords) -> Iterator[tuple[str, bytes]]:
    """The lines of a file with their places, without lines that are too long."""
    number = 0
    try:
        with opened(path) as file:
            while line := file.readline(LONGEST_LINE_BYTES):
                number += 1
                place = f"{name}:{number}"
                if number == 1 and line.startswith(_UTF_16):
                    faults.add("UTF-16; wanted UTF-8", name)
                    return
                if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                    faults.add("a line over 64 MiB", place)
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE_BYTES)
                    continue
                yield place, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    except DamagedFile as error:
        faults.add(f"a damaged file ({error})", f"{name} after line {number}")
        return
    if not number:
        faults.add("an empty file", name)


class DamagedFile(Exception):
    """A compressed file cannot be decompressed to its end."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of bytes, decompressed if its name ends in .gz, .zst, .xz or .bz2. Reading it raises
    DamagedFile where it cannot be decompressed."""
    ending = path.suffix.lower()
    readers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    try:
        with readers.get(ending, open)(path, "rb") as file:
            if ending == ".zst":
                import pyarrow

                # Unlike the reader of `zstandard`, it tells a file that was cut short.
                with pyarrow.CompressedInputStream(file, "zstd") as decompressed:
                    yield io.BufferedReader(decompressed)
            else:
                yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of the compressed data
        raise DamagedFile(str(error)) from error


def _table(
    path: Path, name: str, faults: UnusableRecords, columns: Sequence[str], ending: str
) -> Iterator[Record]:
    import pyarrow

    batches = _parquet_batches if ending == ".parquet" else _arrow_batches
    number = 0
    try:
        for batch in batches(path, columns):
            for record in _rows(batch):
                number += 1
                place = f"{name}:{number}"
                if record is None:
                    faults.add("bytes that are not UTF-8", place)
                else:
                    yield place, record
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of the pages
        faults.add(f"a damaged file ({first_line(error)})", f"{name} after row {number}")
        return
    if not number:
        faults.add("an empty file", name)


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        chosen = [name for name in columns if name in table.schema_arrow.names]
        yield from table.iter_batches(batch_size=1000, columns=chosen)


def _arrow_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Batches of an Arrow stream, as `datasets` writes it, or of an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(mapped)
            found = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            found = reader = pyarrow.ipc.open_stream(mapped)
        chosen = [name for name in columns if name in reader.schema.names]
        for batch in found:
            for start in range(0, len(batch), 1000):
                yield batch.slice(start, 1000).select(chosen)


def _rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for a row with bytes that are not UTF-8, which Parquet allows."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]
