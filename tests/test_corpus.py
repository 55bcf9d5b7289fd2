"""Corpora: the same documents whatever the container, and every unusable record counted."""

import errno
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from clustering.errors import UserError
from xelm.data import records
from xelm.data.contents import contents_of
from xelm.data.parts import Document
from xelm.data.reading import read
from xelm.data.unusable import UnusableRecords

TEXTS = ["Der alte Mann", "und das Meer", "ſtraße 🐟 море 海"]


def lines(*records) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def gz(data: bytes) -> bytes:
    return gzip.compress(data)


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def parquet(*records) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), sink)
    return sink.getvalue().to_pybytes()


def read_folder(folder, contents: dict[str, bytes], languages=None):
    """The documents of a folder with these files, and what was left out of it."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    faults = UnusableRecords()
    return list(read(folder, faults, languages)), faults.to_json()


def only(reason: str, count: int, *first: str) -> dict:
    return {reason: {"count": count, "first": list(first)}}


RECORDS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("de.jsonl", lines(*RECORDS)),
        ("de.jsonl.gz", gz(lines(*RECORDS))),
        ("de.jsonl.gz", gz(lines(*RECORDS[:1])) + gz(lines(*RECORDS[1:]))),
        ("de.jsonl.zst", zst(lines(*RECORDS))),
        ("de.jsonl.zst", zst(lines(*RECORDS[:1])) + zst(lines(*RECORDS[1:]))),
        ("de.parquet", parquet(*RECORDS)),
        ("de.jsonl", b"\xef\xbb\xbf" + lines(*RECORDS)),
        ("de.jsonl", lines(*RECORDS).rstrip(b"\n")),
        ("de.jsonl", lines(*RECORDS).replace(b"\n", b"\r\n\r\n \n")),
    ],
    ids=["plain", "gz", "gz twice", "zst", "zst twice", "parquet", "BOM", "no end", "blank lines"],
)
def test_the_documents_do_not_depend_on_the_container(tmp_path, name, content):
    documents, left_out = read_folder(tmp_path, {name: content})
    assert documents == [Document(text, "de") for text in TEXTS]
    assert left_out == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "cut sho\n', "broken JSON"),
        (b"not JSON\n", "broken JSON"),
        (b"[" * 100_000 + b"\n", "broken JSON"),
        (b'{"text": "caf\xe9"}\n', "bytes that are not UTF-8"),
        (b'{"id": 7}\n', 'no "text"'),
        (b'{"text": null}\n', 'no "text"'),
        (b'{"text": ["a"]}\n', 'no "text"'),
        (b'{"text": ""}\n', "empty text"),
        (b'{"text": " \\n\\u3000"}\n', "empty text"),
        (b'["text"]\n', "no object"),
        (b"7\n", "no object"),
        (b'{"text": "a", "lang": 7}\n', 'no "lang"'),
        (b'{"text": "\\ud83d"}\n', "half of a surrogate pair"),
        (b'{"text": "D\\u0000e\\u0000r"}\n', "the character U+0000"),
    ],
)
def test_an_unusable_record_is_counted_with_its_place_and_stops_nothing(tmp_path, content, reason):
    whole = lines({"text": "a"}) + content + lines({"text": "b"})
    documents, left_out = read_folder(tmp_path, {"de.jsonl": whole})
    assert [document.text for document in documents] == ["a", "b"]
    assert left_out == only(reason, 1, "de.jsonl:2")


@pytest.mark.parametrize("name", ["de.txt", "de.txt.gz", "de.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_of_utf_16_is_one_fault_of_its_name(tmp_path, name, encoding):
    content = "\ufeffDer alte Mann\n\nund das Meer\n".encode(encoding)
    content = gz(content) if name.endswith(".gz") else content
    documents, left_out = read_folder(tmp_path, {name: content})
    assert (documents, left_out) == ([], only("UTF-16; wanted UTF-8", 1, name))


@pytest.mark.parametrize("container", [parquet, lines])
def test_text_with_nul_is_left_out_whatever_it_is_read_from(tmp_path, container):
    name = "de.parquet" if container is parquet else "de.jsonl"
    content = container({"text": "Der alte Mann"}, {"text": "D\0e\0r"})
    documents, left_out = read_folder(tmp_path, {name: content})
    assert [document.text for document in documents] == ["Der alte Mann"]
    assert left_out == only("the character U+0000", 1, f"{name}:2")
    unmarked = "eins\nzwei\n".encode("utf-16-le")  # without a byte order mark
    documents, left_out = read_folder(tmp_path / "txt", {"de.txt": unmarked})
    assert documents == [] and set(left_out) == {"the character U+0000"}


def test_unknown_languages_are_one_reason_however_many_they_are(tmp_path):
    records = [{"text": "a", "lang": f"x{number} " * 50} for number in range(100)]
    documents, left_out = read_folder(tmp_path, {"de.jsonl": lines(*records)})
    assert documents == []
    places = [f"de.jsonl:{n + 1} {(f'x{n} ' * 50)[:40]!r}" for n in range(3)]
    assert left_out == only("an unknown language", 100, *places)


def test_unusable_rows_of_parquet_are_counted_like_those_of_json(tmp_path):
    rows = [
        {"text": "a", "lang": "de"},
        {"text": None, "lang": None},
        {"text": " ", "lang": None},
        {"text": "b", "lang": "klingonish"},
    ]
    documents, left_out = read_folder(tmp_path, {"de.parquet": parquet(*rows)})
    assert documents == [Document("a", "de")]
    assert left_out == {
        **only('no "text"', 1, "de.parquet:2"),
        **only("empty text", 1, "de.parquet:3"),
        **only("an unknown language", 1, "de.parquet:4 'klingonish'"),
    }


def test_bytes_in_parquet_that_are_not_utf8_are_counted_by_row(tmp_path):
    ends = pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]))
    texts = [None, ends, pyarrow.py_buffer(b"a\xff\xfeb")]
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts)})
    pyarrow.parquet.write_table(table, tmp_path / "de.parquet")
    documents, left_out = read_folder(tmp_path, {})
    assert documents == [Document("a", "de"), Document("b", "de")]
    assert left_out == only("bytes that are not UTF-8", 1, "de.parquet:2")


def test_parquet_without_texts_has_every_row_counted(tmp_path):
    rows = [{"body": "a"}, {"body": "b"}]
    documents, left_out = read_folder(tmp_path, {"de.parquet": parquet(*rows)})
    assert documents == []
    assert left_out == only('no "text"', 2, "de.parquet:1", "de.parquet:2")


def test_counts_are_exact_and_the_first_three_places_are_named(tmp_path):
    content = lines({"text": "a"}, *[{"text": ""}] * 5, {"text": "b"}, {"id": 1})
    documents, left_out = read_folder(tmp_path, {"de.jsonl": content, "en.jsonl": content})
    assert [d.language for d in documents] == ["de", "de", "en", "en"]
    assert left_out == {
        **only("empty text", 10, "de.jsonl:2", "de.jsonl:3", "de.jsonl:4"),
        **only('no "text"', 2, "de.jsonl:8", "en.jsonl:8"),
    }


def test_the_report_names_counts_reasons_and_places():
    faults = UnusableRecords()
    assert not faults
    for line in range(4):
        faults.add("broken JSON", f"de.jsonl:{line}")
    faults.add("empty text", "en.jsonl:9")
    assert faults
    assert str(faults) == (
        "5 records were left out: broken JSON (4, first at de.jsonl:0, de.jsonl:1, de.jsonl:2); "
        "empty text (1, first at en.jsonl:9)"
    )


@pytest.mark.parametrize("pack", [gz, zst])
def test_a_file_cut_short_gives_what_it_holds_and_says_so(tmp_path, pack):
    # Text that does not compress, so that half of the file is about half of the documents.
    draw = random.Random(0)
    many = lines(*({"text": draw.randbytes(16).hex()} for _ in range(20_000)))
    packed = pack(many)
    name = f"de.jsonl.{pack.__name__}"
    whole, left_out = read_folder(tmp_path, {name: packed})
    assert len(whole) == 20_000 and left_out == {}
    documents, left_out = read_folder(tmp_path, {name: packed[: len(packed) // 2]})
    assert 1_000 < len(documents) < 19_000
    assert documents == whole[: len(documents)]
    (reason,) = left_out
    assert reason.startswith("a damaged file (")
    assert left_out == only(reason, 1, f"{name} after line {len(documents)}")


@pytest.mark.parametrize("name", ["de.jsonl.gz", "de.jsonl.zst", "de.parquet"])
def test_a_damaged_file_does_not_stop_the_others(tmp_path, name):
    contents = {name: b"no such thing" * 10, "en.jsonl": lines({"text": "a"})}
    documents, left_out = read_folder(tmp_path, contents)
    assert documents == [Document("a", "en")]
    (reason,) = left_out
    assert reason.startswith("a damaged file (")
    unit = "row" if name.endswith("parquet") else "line"
    assert left_out == only(reason, 1, f"{name} after {unit} 0")


def test_damaged_pages_of_parquet_do_not_stop_the_others(tmp_path):
    whole = bytearray(parquet(*[{"text": f"text {number}"} for number in range(3000)]))
    whole[20 : len(whole) // 3] = b"\xff" * (len(whole) // 3 - 20)
    contents = {"de.parquet": bytes(whole), "en.jsonl": lines({"text": "a"})}
    documents, left_out = read_folder(tmp_path, contents)
    assert documents == [Document("a", "en")]
    (reason,) = left_out
    assert reason.startswith("a damaged file (") and "\n" not in reason
    assert left_out == only(reason, 1, "de.parquet after row 0")


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub_answers(monkeypatch):
    """The Hub knows every data set at one commit, with the one configuration `default`."""
    import datasets
    import huggingface_hub

    def dataset_info(self, name, *, revision=None):
        assert name == "owner/texts"
        return huggingface_hub.DatasetInfo(id=name, sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["default"])


def test_a_stream_that_breaks_is_one_line_with_its_place(monkeypatch, hub_answers):
    import datasets

    def stream(*arguments, **options):
        yield {"text": "a"}
        raise ConnectionError("the other side\nhas gone")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    documents = read("hf://owner/texts/de", UnusableRecords())
    assert next(documents) == Document("a", "de")
    with pytest.raises(UserError) as caught:
        next(documents)
    assert str(caught.value) == (
        f"cannot read hf://owner/texts@{COMMIT}/de after record 1: the other side"
    )


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://owner/texts", ("owner/texts", "train")),
        ("hf://owner/texts/de", ("owner/texts", "de", "train")),
        ("hf://owner/texts:validation", ("owner/texts", "validation")),
        ("hf://owner/texts/de:validation", ("owner/texts", "de", "validation")),
    ],
)
def test_an_address_on_the_hub_names_data_set_config_and_split(
    monkeypatch, hub_answers, name, asked
):
    import datasets

    def stream(*arguments, split, streaming, revision):
        assert streaming and (*arguments, split) == asked and revision == COMMIT
        return [{"text": "a", "lang": "sw"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", stream)
    faults = UnusableRecords()
    config = [Document("b", "de")] if "/de" in name else []
    assert list(read(name, faults)) == [Document("a", "sw"), *config]
    assert faults.to_json() == (
        {} if config else only('no "lang"', 1, f"{name.replace('texts', f'texts@{COMMIT}')}:2")
    )


@pytest.fixture
def hub_copy(tmp_path, monkeypatch, hub_answers):
    """A folder that is read as what the Hub has under the name owner/texts."""
    import datasets
    from datasets.inspect import get_dataset_config_names as names

    load = datasets.load_dataset
    folder = tmp_path / "copy"
    folder.mkdir()

    def load_dataset(name, *config, split, streaming, revision):
        assert (name, revision) == ("owner/texts", COMMIT)
        return load(str(folder), *config, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        datasets, "get_dataset_config_names", lambda name, revision: names(str(folder))
    )
    return folder


def test_a_split_that_is_not_there_is_one_line_with_those_that_are(hub_copy):
    for split in ("train", "validation"):
        (hub_copy / f"{split}.jsonl").write_bytes(lines({"text": split, "lang": "de"}))
    assert list(read("hf://owner/texts:validation", UnusableRecords())) == [
        Document("validation", "de")
    ]
    with pytest.raises(UserError) as caught:
        list(read("hf://owner/texts:test", UnusableRecords()))
    assert str(caught.value) == (
        f"cannot open hf://owner/texts@{COMMIT}:test: Bad split: test. "
        "Available splits: ['train', 'validation']"
    )


def test_a_fault_of_the_disk_is_not_taken_for_one_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "de.jsonl").write_bytes(lines({"text": "a"}))

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(records, "opened", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(read(tmp_path, UnusableRecords()))


def test_a_line_that_is_too_long_is_skipped_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE_BYTES", 50)
    content = lines({"text": "a"}, {"text": "x" * 130}, {"text": "b"}, {"text": "y" * 50})
    documents, left_out = read_folder(tmp_path, {"de.jsonl": content})
    assert [document.text for document in documents] == ["a", "b"]
    assert left_out == only("a line over 64 MiB", 2, "de.jsonl:2", "de.jsonl:4")


def test_a_document_of_a_megabyte_is_kept_whole(tmp_path):
    text = "море " * 125_000
    documents, left_out = read_folder(tmp_path, {"ru.jsonl.gz": gz(lines({"text": text}))})
    assert len(text.encode()) > 1_000_000
    assert documents == [Document(text.strip(), "ru")]
    assert left_out == {}


def test_text_becomes_nfc_and_is_stripped(tmp_path):
    record = {"text": "  cafe\u0301 \uac00 \u1100\u1161\n"}
    documents, _ = read_folder(tmp_path, {"fr.jsonl": lines(record)})
    assert documents == [Document("caf\u00e9 \uac00 \uac00", "fr")]


def test_the_record_knows_its_language_better_than_the_file_name(tmp_path):
    records = [{"text": "a"}, {"text": "b", "lang": "swh"}, {"text": "c", "lang": ""}]
    documents, left_out = read_folder(tmp_path, {"deu.jsonl": lines(*records)})
    assert [document.language for document in documents] == ["de", "sw", "de"]
    assert left_out == {}


def test_a_single_file_holds_any_languages_but_must_name_them(tmp_path):
    path = tmp_path / "de.jsonl"
    path.write_bytes(lines({"text": "a", "lang": "en"}, {"text": "b"}))
    faults = UnusableRecords()
    assert list(read(path, faults)) == [Document("a", "en")]
    assert faults.to_json() == only('no "lang"', 1, "de.jsonl:2")


def test_files_of_other_languages_are_not_opened(tmp_path):
    contents = {"de.jsonl": lines({"text": "a"}), "eng.jsonl.gz": b"damaged"}
    documents, left_out = read_folder(tmp_path, contents, languages=["de"])
    assert documents == [Document("a", "de")] and left_out == {}
    _, left_out = read_folder(tmp_path, contents, languages=["en"])
    assert len(left_out) == 1
    with pytest.raises(UserError, match="has no file of sw, tr"):
        list(read(tmp_path, UnusableRecords(), ["sw", "tr"]))


def test_a_file_of_another_name_among_them_matters_only_when_all_are_asked_for(tmp_path):
    contents = {"de.jsonl": lines({"text": "a"}), "notes.jsonl": lines({"text": "b"})}
    documents, left_out = read_folder(tmp_path, contents, languages=["de"])
    assert documents == [Document("a", "de")] and left_out == {}
    documents, left_out = read_folder(tmp_path, contents)
    assert documents == [Document("a", "de")]
    assert left_out == only("an unknown language", 1, "notes.jsonl:1 'notes'")


def test_files_come_sorted_and_others_are_skipped(tmp_path):
    for name in ("sw.jsonl.zst", "de.parquet", "README.md", "en.jsonl", "fr.csv"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "tr.jsonl").mkdir()
    found = contents_of(tmp_path)
    assert [part.name for part in found.parts] == ["de.parquet", "en.jsonl", "sw.jsonl.zst"]
    assert [part.language for part in found.parts] == ["de", "en", "sw"]
    assert found.skipped == {"of an unknown format": ["README.md", "fr.csv"]}


def test_what_is_no_corpus_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"corpus .*nothing does not exist"):
        contents_of(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no corpus file; wanted <language>\.jsonl or"):
        contents_of(tmp_path)
    (tmp_path / "de.csv").write_text("a")
    with pytest.raises(UserError, match=r"de\.csv is no corpus file; wanted \.jsonl,"):
        contents_of(tmp_path / "de.csv")
    for name in (
        "hf://dataset",
        "hf://a/b/c/d",
        "hf://owner/dataset:",
        "hf://owner/dataset/:train",
    ):
        with pytest.raises(UserError) as caught:
            list(read(name, UnusableRecords()))
        wanted = f"a Hub corpus is hf://owner/dataset[@revision][/config][:split]; got {name}"
        assert str(caught.value) == wanted


def test_the_fingerprint_follows_names_and_contents_of_what_is_read(tmp_path):
    (tmp_path / "de.jsonl").write_bytes(lines({"text": "a"}))
    (tmp_path / "en.jsonl").write_bytes(lines({"text": "b"}))
    before, german = (
        contents_of(tmp_path).fingerprint(),
        contents_of(tmp_path, ["de"]).fingerprint(),
    )
    assert contents_of(tmp_path).fingerprint() == before != german
    (tmp_path / "en.jsonl").write_bytes(lines({"text": "c"}))
    assert contents_of(tmp_path).fingerprint() != before
    assert contents_of(tmp_path, ["de"]).fingerprint() == german
    (tmp_path / "de.jsonl").rename(tmp_path / "deu.jsonl")
    assert contents_of(tmp_path, ["de"]).fingerprint() != german
