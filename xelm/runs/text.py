"""Text of a RUN: tokenised corpora, made once, and the TF-IDF vectors fitted on them."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from clustering import codes, tfidf
from clustering.errors import UserError
from clustering.files import sha256, write_arrays
from experts import manifest
from experts.lock import locked
from xelm.data.contents import Contents
from xelm.data.reading import Reading
from xelm.data.store import Store
from xelm.data.text_stats import duplicate_notes, text_stats, warnings
from xelm.data.tokenise import build_store
from xelm.models.checkpoint import all_or_nothing
from xelm.progress import bar
from xelm.runs.run import Run, open_run
from xelm.settings import differences

VECTORISER_DOCUMENTS = 20_000
"""Number of documents, of all languages together, that the TF-IDF vectors are fitted on."""
WAIT_SECONDS = 3600.0
"""Longest wait for another command that is tokenising the same corpus, whose work is then used."""


@contextmanager
def elsewhere(run: Run) -> Iterator[Run]:
    """Context with a RUN in a temporary folder, which has the tokenizer of `run`: text that is
    tokenised there leaves nothing in `run`."""
    with TemporaryDirectory() as folder:
        place = replace(run, directory=Path(folder))
        run.tokenizer().hub.save_pretrained(place.training("tokenizer"))
        yield place


def tokenise(
    run: Run,
    contents: Contents,
    name: str,
    *,
    workers: int = 1,
    training: bool = True,
    older: Mapping[str, Store] | None = None,
) -> Store:
    """The tokenised corpus RUN/corpus/`name`, made now unless it is there for these contents and
    the RUN's tokenizer; what is left out is printed on stderr. workers: number of processes.
    training: whether to train on it, without exact copies of documents unless the RUN keeps
    them. older: stores by name that it is added to; copies of their documents are left out, and it
    may lack some of the languages."""
    directory, corpus = run.directory / "corpus" / name, contents.corpus
    facts = {
        "corpus": corpus.to_json(),
        "corpus_sha256": contents.fingerprint(),
        "tokenizer_sha256": sha256(run.tokenizer_directory() / "tokenizer.json"),
        "language_codes": codes.VERSION,
        # Files may contain more languages than are wanted.
        "languages_wanted": None if contents.languages is None else sorted(contents.languages),
    }
    if older is not None:
        facts["older"] = {name: store.record["corpus_sha256"] for name, store in older.items()}
    drop_duplicates = training and not run.record.get("keep_duplicates", False)
    with locked(run.directory, f"corpus-{name}", wait_seconds=WAIT_SECONDS):
        if (directory / "store.json").exists():
            store = run.store(name)
            if name == "train" and (run.directory / "registry.json").exists():
                _check_trained_on(store, facts)
                return store
            same = all(store.record.get(key, ...) == facts[key] for key in list(facts)[1:])
            # What a seed was trained on stays; text to compare with it is read again.
            if same and (training or store.fingerprints() is not None):
                return store
        contents.check()
        reading = Reading(contents)
        with bar(None, f"tokenise {name}", "doc") as progress:
            store = build_store(
                directory,
                reading.documents(),
                run.tokenizer(),
                reading.unusable,
                languages=contents.languages if older is None else None,
                facts=facts,
                workers=workers,
                drop_duplicates=drop_duplicates,
                known=None if older is None else _hashes(older, contents.languages or ()),
                described=lambda: {"origins": reading.origins()},
                progress=progress.update,
            )
    print(reading.table(), file=sys.stderr)
    notes = [str(reading.unusable)] if reading.unusable else []
    for note in [*notes, *_notes(store, drop_duplicates, training)]:
        print(f"{corpus}: {note}", file=sys.stderr)
    return store


def _hashes(stores: Mapping[str, Store], languages: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Hashes of the documents of some stores by language."""
    return {
        tag: [store.languages[tag].hashes for store in stores.values() if tag in store.languages]
        for tag in languages
    }


def _notes(store: Store, drop_duplicates: bool, training: bool) -> list[str]:
    """Lines on a text that was just tokenised: copies that were found or left out and, where it is
    for training, which languages the tokenizer suits badly."""
    texts = text_stats(store)
    notes = [*duplicate_notes(texts, drop_duplicates), *(warnings(texts) if training else ())]
    if left_out := {tag: n for tag, n in store.record.get("known", {}).items() if n}:
        which = ", ".join(f"{tag} {count:,}" for tag, count in left_out.items())
        notes.append(f"exact copies of documents of the text before ({which}); left out")
    return notes


def _check_trained_on(store: Store, facts: Mapping[str, Any]) -> None:
    """Raises UserError unless a store that experts were trained on has the wanted contents; their
    clusters and centres refer to its documents by number."""
    before = {**store.record, "languages_wanted": sorted(store.languages)}
    names = ("corpus_sha256", "tokenizer_sha256", "languages_wanted")
    if differ := "; ".join(differences(before, {name: facts[name] for name in names})):
        raise UserError(
            f"{store.directory} is the text that experts are trained on, and is not made again: "
            f"{differ}"
        )


def fit_vectoriser(run: Run, store: Store) -> None:
    """Fits the TF-IDF vectors on a sample of the corpus, unless they are there."""
    if (run.directory / "vectoriser.npz").exists():
        return
    print("fitting TF-IDF vectors", file=sys.stderr)
    # Equally many of each language, evenly spaced, so that terms of small languages are known too.
    most = -(-VECTORISER_DOCUMENTS // len(store.languages))
    documents = (
        ids.document(number)
        for ids in store.languages.values()
        for number in range(0, len(ids), -(-len(ids) // most))
    )
    size, config = run.tokenizer().size, run.config
    fitted = tfidf.fit(documents, size, config.vectoriser_dimensions, config.seed.random_seed)
    arrays = {"idf": fitted.idf, "projection": fitted.projection}
    write_arrays(run.directory / "vectoriser.npz", arrays)
    manifest.record(run.directory, ["vectoriser.npz"], again=True)


def link_from_sibling(run: Run, sibling: Path) -> None:
    """Links the tokenised corpus and the vectors of another RUN (`sibling`) whose seed this RUN
    has, if both have the same corpus: many RUNs can start from one seed at the cost of one."""
    if not (sibling / "run.json").exists() or (run.directory / "corpus" / "train").exists():
        return
    other, text = open_run(sibling, finished=False), sibling / "corpus" / "train"
    same = ("corpus_sha256", "languages", "keep_duplicates")
    if (
        any(other.record.get(key) != run.record.get(key) for key in same)
        or other.config.vectoriser_dimensions != run.config.vectoriser_dimensions
        or other.config.held_out != run.config.held_out
        or not ((text / "store.json").exists() and (sibling / "vectoriser.npz").exists())
    ):
        return
    with all_or_nothing(run.directory / "corpus" / "train") as partial:
        shutil.copytree(text, partial, copy_function=_link, dirs_exist_ok=True)
        _link(sibling / "vectoriser.npz", run.directory / "vectoriser.npz")


def _link(source: str | Path, target: str | Path) -> None:
    """Makes a hard link to a file, or a copy where the file systems do not allow that. Files of a
    store are replaced and never changed, so that a link is safe."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)
