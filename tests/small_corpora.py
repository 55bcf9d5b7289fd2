"""Small corpora in memory and on disk: records as JSON lines, Parquet and Arrow."""

import json
from itertools import groupby

import pyarrow
import pyarrow.parquet

from xelm.data.reading import read
from xelm.data.unusable import UnusableRecords


def lines(*records) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def parquet(*records) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), sink)
    return sink.getvalue().to_pybytes()


def arrow(*records) -> bytes:
    table = pyarrow.Table.from_pylist(list(records))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def write(folder, contents: dict[str, bytes]):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def texts(corpus, languages=None) -> dict[str, list[str]]:
    """Language -> texts, all of which are usable; those in other languages are counted."""
    unusable = UnusableRecords()
    documents = sorted(read(corpus, unusable, languages), key=lambda document: document.language)
    assert languages or not unusable
    assert all(reason.endswith("which was not requested") for reason in unusable.counts)
    grouped = groupby(documents, key=lambda document: document.language)
    return {tag: [document.text for document in found] for tag, found in grouped}


HABARI, MANN = {"text": "Habari"}, {"text": "Der alte Mann"}

BOTH = {"de": ["Der alte Mann"], "sw": ["Habari"]}
