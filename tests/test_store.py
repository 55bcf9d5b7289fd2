"""The tokenised corpus: what was encoded can be read back, and it is there whole or not at all."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clustering.errors import UserError
from clustering.files import write_json
from xelm.data import reading, store_writer, tokenise
from xelm.data.parts import Document, Part
from xelm.data.store import open_store, shuffled
from xelm.data.tokenise import BATCH_DOCUMENTS, build_store
from xelm.data.unusable import UnusableRecords
from xelm.runs.run import open_run


class Characters:
    """A tokenizer of characters: id of a character is its code point."""

    def __init__(self, size=2**16):
        self.size = size

    def encode(self, texts):
        return [[ord(character) for character in text] for text in texts]


class Plain:
    """Counts of a tokenizer that spells everything."""

    def count(self, texts, ids):
        return np.asarray([(len(t), len("".join(t.split())), 0, 0) for t in texts], np.int32)


TEXTS = {"de": ["Straße", "Meer", "ü"], "el": ["Μέλι", "ένα δύο"]}
DOCUMENTS = [Document(text, language) for language, found in TEXTS.items() for text in found]


class Given(Part):
    """Part of a corpus that consists of given documents."""

    def all_documents(self, unusable):
        return ((f"record {n}", document) for n, document in enumerate(self.location, 1))


def build(directory, documents=DOCUMENTS, tokenizer=None, **options):
    """Builds a store of the documents in the languages asked for, as a corpus is read."""
    unusable = options.pop("unusable", UnusableRecords())
    tokenizer, options = tokenizer or Characters(), {"coverage": Plain(), **options}
    kept = Given(documents, languages=options.get("languages")).documents(unusable)
    return build_store(directory, kept, tokenizer, unusable, **options)


def test_documents_are_those_that_were_encoded(tmp_path):
    # Interleaved, and more than one batch: order within a language is that of the corpus.
    many = [
        Document(f"{language} {number} " + "x" * (number % 7), language)
        for number in range(BATCH_DOCUMENTS + 50)
        for language in ("de", "el")
    ]
    store = build(tmp_path / "store", many)
    for language, found in store.languages.items():
        wanted = [document.text for document in many if document.language == language]
        assert len(found) == len(wanted)
        read = ["".join(map(chr, found.document(number))) for number in range(len(found))]
        assert read == wanted
        assert found.lengths.tolist() == [len(text) for text in wanted]
        assert found.bytes.tolist() == [len(text.encode()) for text in wanted]


def test_counts_are_those_of_the_texts(tmp_path):
    store = build(tmp_path / "store", facts={"corpus": "here"})
    for language, texts in TEXTS.items():
        assert store.record["languages"][language] == {
            "documents": len(texts),
            "tokens": sum(map(len, texts)),
            "bytes": sum(len(text.encode()) for text in texts),
            "characters": sum(map(len, texts)),
            "visible_characters": sum(len(text.replace(" ", "")) for text in texts),
            "unknown_characters": 0,
            "byte_tokens": 0,
            "duplicates": 0,
        }
    assert store.record["corpus"] == "here"
    assert store.record["format"] == 2


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_two_bytes_where_they_can(tmp_path, size, dtype):
    text = chr(size - 1) * 3
    store = build(tmp_path / "store", [Document(text, "de")], Characters(size))
    ids = store.languages["de"].ids
    assert ids.dtype == dtype
    assert ids.tolist() == [size - 1] * 3
    path = tmp_path / "store" / "de.ids"
    assert path.stat().st_size == 3 * np.dtype(dtype).itemsize


def test_opening_again_gives_the_same(tmp_path):
    built, opened = build(tmp_path / "store"), open_store(tmp_path / "store")
    assert opened.record == built.record
    for language, found in built.languages.items():
        again = opened.languages[language]
        np.testing.assert_array_equal(again.ids, found.ids)
        np.testing.assert_array_equal(again.ends, found.ends)
        np.testing.assert_array_equal(again.bytes, found.bytes)
        order, stream_ends = shuffled(language, found.lengths)
        np.testing.assert_array_equal(again.order, order)
        np.testing.assert_array_equal(again.stream_ends, stream_ends)


def test_only_the_languages_asked_for_are_kept_in_their_order_and_others_counted(tmp_path):
    unusable = UnusableRecords()
    unusable.add("empty text", "de.jsonl:7")
    store = build(tmp_path / "store", languages=["el"], unusable=unusable)
    assert list(store.languages) == ["el"]
    assert store.record["left_out"] == {
        "empty text": {"count": 1, "first": ["de.jsonl:7"]},
        "language de, which was not requested": {
            "count": 3,
            "first": ["record 1", "record 2", "record 3"],
        },
    }
    assert list(build(tmp_path / "both", languages=["el", "de"]).languages) == ["el", "de"]


@pytest.mark.parametrize(
    ("documents", "languages", "reason"),
    [
        (DOCUMENTS, ["de", "sw", "tr"], "no usable document in sw, tr"),
        ([], None, "no usable document in any language"),
    ],
)
def test_a_language_without_documents_is_refused_by_name(tmp_path, documents, languages, reason):
    with pytest.raises(UserError, match=reason):
        build(tmp_path / "store", documents, languages=languages)
    assert list(tmp_path.iterdir()) == []


class Interrupting(Characters):
    def encode(self, texts):
        raise KeyboardInterrupt


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_build_leaves_what_was_there(tmp_path, there):
    if there:
        build(tmp_path / "store")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", [Document("neu", "de")], Interrupting())
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == (["store"] if there else [])


MANY = [
    Document(f"{language} {n} ü" * (n % 5 + 1), language) for n in range(60) for language in TEXTS
]
MANY.insert(30, Document("außerdem", "nl"))
FACTS = {"corpus_sha256": "of it"}


def killed_at(batch: int):
    """A tokenizer that gives up at that batch."""

    class Killed(Characters):
        batches = 0

        def encode(self, texts):
            self.batches += 1
            if self.batches == batch:
                raise KeyboardInterrupt
            return super().encode(texts)

    return Killed()


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(store_writer, "NOTE_SECONDS", -1.0)  # after every batch


@pytest.mark.parametrize("batches", [[1], [4], [17], [3, 5, 2]])
def test_a_build_that_was_killed_goes_on_and_ends_with_the_same(tmp_path, small_batches, batches):
    options = {"languages": ["el", "de"], "facts": FACTS}
    build(tmp_path / "whole", MANY, **options)
    for batch in batches:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "store", MANY, killed_at(batch), **options)
        assert not (tmp_path / "store").exists()
        # What was being written when the machine went down.
        for path in (tmp_path / ".store.partial").glob("el.*"):
            with path.open("ab") as file:
                file.write(b"12345")
    heard, unusable = [], UnusableRecords()
    build(*(tmp_path / "store", MANY), unusable=unusable, progress=heard.append, **options)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert heard[0] == 7 * sum(batch - 1 for batch in batches) and sum(heard) == 120
    assert unusable.counts == {"language nl, which was not requested": 1}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_build_whose_files_are_shorter_than_noted_begins_anew(tmp_path, small_batches):
    """As after a power cut."""
    options = {"languages": ["el", "de"], "facts": FACTS}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", MANY, killed_at(9), **options)
    ids = tmp_path / ".store.partial" / "el.ids"
    os.truncate(ids, ids.stat().st_size // 2)
    heard = []
    store = build(tmp_path / "store", MANY, progress=heard.append, **options)
    assert heard[0] == 0
    assert all(found.lengths.min() > 0 for found in store.languages.values())
    build(tmp_path / "whole", MANY, **options)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_what_is_done_outlives_a_fault_of_reading(tmp_path, small_batches):
    options = {"languages": ["el", "de"], "facts": FACTS}

    def broken():
        yield from MANY[:80]
        raise OSError(5, "Input/output error", "de.jsonl")

    with pytest.raises(UserError, match=r"de\.jsonl: Input/output error"):
        build(tmp_path / "store", broken(), **options)
    heard = []
    build(tmp_path / "store", MANY, progress=heard.append, **options)
    assert heard[0] == 77


@pytest.mark.parametrize(
    "other",
    [{"facts": {"corpus_sha256": "of another"}}, {"languages": ["de"]}, {"facts": None}],
)
def test_a_build_of_something_else_is_not_gone_on_with(tmp_path, small_batches, other):
    options = {"languages": ["el", "de"], "facts": FACTS}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", MANY, killed_at(9), **options)
    heard = []
    build(tmp_path / "store", MANY, progress=heard.append, **options | other)
    assert heard[0] == 0
    build(tmp_path / "whole", MANY, **options | other)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_processes_make_what_one_makes(tiny, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 20)
    tokenizer, made = open_run(tiny.directory).tokenizer(), []
    here = []  # of the texts
    encode = tokenizer.encode
    for name in ("one", "two"):
        texts = reading.read(tiny_corpus, UnusableRecords())
        monkeypatch.setattr(tokenizer, "encode", lambda batch: here.extend(batch) or encode(batch))
        workers = 2 if name == "two" else 1
        build_store(tmp_path / name, texts, tokenizer, UnusableRecords(), workers=workers)
        made.append((content(tmp_path / name), len(here)))
        here.clear()
    (one, all_of_them), (two, first_of_them) = made
    assert one == two
    assert first_of_them == 20 * tokenise._BATCHES_HERE < all_of_them


def test_few_documents_start_no_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "ProcessPoolExecutor", None)
    tokenizer = open_run(tiny.directory).tokenizer()
    documents = [Document("Meer", "de"), Document("Salz", "de")]
    store = build_store(tmp_path / "s", documents, tokenizer, UnusableRecords(), workers=2)
    found = [store.languages["de"].document(number).tolist() for number in range(2)]
    assert found == tokenizer.encode(["Meer", "Salz"])


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_build_and_not_the_machine(tiny, tmp_path):
    run = open_run(tiny.directory)

    def documents():
        for number in range(10_000):
            if number == 3000:
                (first, *_) = multiprocessing.active_children()
                first.kill()
            yield Document("Meer", "de")

    with pytest.raises(UserError, match="a process that tokenises was killed"):
        build_store(tmp_path / "s", documents(), run.tokenizer(), UnusableRecords(), workers=2)
    assert multiprocessing.active_children() == [] and list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*/store: No space left on device"):
        build(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_store_gets_its_name_when_its_bytes_are_on_disk(tmp_path, monkeypatch):
    fsync, replace = os.fsync, os.replace
    flushed, named = set(), []

    def flush(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def rename(source, target):
        if target == tmp_path / "store":
            named.extend(path.name for path in source.iterdir() if path.stat().st_ino in flushed)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    build(tmp_path / "store")
    assert sorted(named) == sorted(os.listdir(tmp_path / "store")) and len(named) == 15


@pytest.mark.parametrize(
    "name", ["de.ids", *(f"de.{n}.npy" for n in ("ends", "bytes", "order", "stream"))]
)
@pytest.mark.parametrize("change", ["longer", "shorter", "odd", "empty", "gone"])
def test_a_store_whose_files_do_not_match_its_record_is_refused(tmp_path, name, change):
    build(tmp_path / "store")
    path = tmp_path / "store" / name
    content = path.read_bytes()
    if name.endswith(".npy") and change in ("longer", "shorter"):
        numbers = np.load(path)
        np.save(path, np.append(numbers, 0) if change == "longer" else numbers[:-1])
    else:
        changed = {"longer": content + b"\0\0", "shorter": content[:-2], "empty": b""}
        path.write_bytes(changed.get(change, content[:-1]))
    if change == "gone":
        path.unlink()
    with pytest.raises(UserError) as caught:
        open_store(tmp_path / "store")
    place = tmp_path / "store"
    assert str(caught.value) == f"{path} does not match store.json; delete {place} and run again"


def test_long_documents_go_in_smaller_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 10)
    lengths = [4, 4, 4, 30, 1, 1]
    documents = [Document("a" * length, "de") for length in lengths]
    heard = []
    store = build(tmp_path / "store", documents, progress=heard.append)
    assert heard == [0, 3, 1, 2]
    assert store.languages["de"].lengths.tolist() == lengths


def test_a_language_without_a_single_token_is_opened(tmp_path):
    class Deaf(Characters):
        def encode(self, texts):
            return [[] for _ in texts]

    store = build(tmp_path / "store", tokenizer=Deaf())
    assert store.languages["de"].lengths.tolist() == [0, 0, 0]
    (tmp_path / "store" / "de.ids").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"de\.ids does not match"):
        open_store(tmp_path / "store")


def test_a_fault_of_reading_is_not_called_one_of_writing(tmp_path):
    def broken():
        yield DOCUMENTS[0]
        raise OSError(errno.EIO, "Input/output error", "/corpus/de.jsonl")

    with pytest.raises(UserError) as caught:
        build(tmp_path / "store", broken())
    assert str(caught.value) == "/corpus/de.jsonl: Input/output error"
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_a_newer_format_is_refused(tmp_path):
    build(tmp_path / "store")
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    write_json(tmp_path / "store" / "store.json", record | {"format": 99})
    with pytest.raises(UserError, match="of format 99"):
        open_store(tmp_path / "store")


def test_the_documents_of_a_corpus_become_the_ids_of_its_tokenizer(tiny, tiny_corpus):
    from xelm.runs.run import open_run

    run = open_run(tiny.directory)
    tokenizer, store = run.tokenizer(), run.store()
    for language, found in store.languages.items():
        texts = [
            json.loads(line)["text"]
            for line in (tiny_corpus / f"{language}.jsonl").read_text().splitlines()
        ]
        assert [found.document(n).tolist() for n in range(len(found))] == tokenizer.encode(texts)
        assert store.record["languages"][language]["bytes"] == sum(len(t.encode()) for t in texts)


MANY_LANGUAGES = """
import resource
from test_store import Document, build

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
tags = [f"{a}{b}" for a in "abcdefghijklmnopqr" for b in "opqrstuvwxyza"]
store = build("store", [Document(f"{tag} {n}", tag) for n in range(2) for tag in tags])
assert len(store.languages) == len(tags) > 204
assert all(store.languages[tag].document(1).tolist() == [*map(ord, tag + " 1")] for tag in tags)
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no such limit")
def test_a_store_may_have_more_files_than_a_process_may_have_open(tmp_path):
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", MANY_LANGUAGES]
    made = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("waiting", [1, 100, 2**26])
def test_what_waits_in_memory_comes_into_the_files_in_order(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(store_writer, "_WAITING_BYTES", waiting)
    store = build(tmp_path / "store", MANY)
    for tag, found in store.languages.items():
        texts = [document.text for document in MANY if document.language == tag]
        read = ["".join(map(chr, found.document(number))) for number in range(len(found))]
        assert read == texts
