"""Vocabularies of experts: which one a checkpoint has, and how a grown expert gets its own.

The tokenizer of an extended vocabulary lies in the folder of the text that it was learned on,
RUN/corpus/TEXT/vocabulary, and later in the expert's checkpoint. Every text that such an expert is
trained or measured on is there twice: in the seed's ids, for what was fitted on these, and beside
them in the ids of the expert (`data.vocabulary.place_in`)."""

import functools
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from clustering.errors import UserError
from clustering.files import read_object, sha256
from experts.expert import SEED, Expert, parse_reference
from xelm.config import StartToken
from xelm.data.contents import Contents
from xelm.data.duplicates import text_hashes
from xelm.data.held_out import TrainingText, held_out_hashes
from xelm.data.parts import Document
from xelm.data.reading import Reading
from xelm.data.rows import LanguageShare
from xelm.data.store import Store, open_store
from xelm.data.text_stats import text_stats
from xelm.data.tokenise import build_store
from xelm.data.tokenizer import Tokenizer
from xelm.data.tokenizer_training import EvenSample
from xelm.data.vocabulary import Vocabulary, in_pieces_of, key_of, load_vocabulary, place_in
from xelm.data.vocabulary_training import extend, kind_of
from xelm.models.checkpoint import (
    all_or_nothing,
    load_parameters,
    read_config,
    read_hub_config,
    stored_dtype,
    write_checkpoint,
)
from xelm.models.stored import root
from xelm.models.vocabulary_rows import (
    METHODS,
    Combination,
    auxiliary_vectors,
    mean_weights,
    resized,
    with_new_rows,
)
from xelm.progress import bar
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run

FOLDER = "vocabulary"
START = "start"
"""Folder within that of a training with the checkpoint that it starts from, where this has more
pieces than the parent's."""
DEFAULT_METHOD = "focus"
LEARNED_BYTES = 20_000_000
"""Bytes of text that pieces are learned on: an even sample of a longer text."""
COMPARED_TOKENS = 2_000_000
"""Tokens of the new text by which pieces are compared with each other."""


def vocabulary_of(run: Run, directory: Path) -> Vocabulary | None:
    """The vocabulary of a checkpoint, or of a folder with a tokenizer; None for the seed's."""
    directory = root(directory)  # an adapter reads as its base does
    if not (directory / "tokenizer.json").is_file():
        return None
    key, base = key_of(directory), run.seed
    if key == key_of(base):
        return None
    return _load(
        directory.absolute(), key, run.tokenizer(), _first_new(run), run.config.start_token
    )


@functools.lru_cache(maxsize=16)
def _load(
    directory: Path, _key: str, base: Tokenizer, first: int, start_token: StartToken
) -> Vocabulary:
    return load_vocabulary(directory, base, first, start_token)


def _first_new(run: Run) -> int:
    """Id of the first new piece: the one behind the rows of the seed and the ids of its tokenizer,
    of which the last may have no rows."""
    last = max(run.tokenizer().hub.get_vocab().values())
    return max(read_config(run.seed).vocabulary_size, last + 1)


def check_extension(run: Run, expert: Expert, options: GrowOptions) -> None:
    """Raises UserError for options that ask for what a new grown expert cannot have."""
    if options.extend_vocabulary is None:
        return
    kind_of(read_object(run.seed / "tokenizer.json")["model"])
    if not read_config(run.seed).causal:
        raise UserError(
            f"{run.directory} has encoders; --extend-vocabulary is for models that continue text"
        )
    if _of_parent(run, expert) is not None:
        raise UserError(
            f"the vocabulary of {expert.parent} is extended already, and its children have it; "
            "grow without --extend-vocabulary, or from another parent"
        )


def _of_parent(run: Run, expert: Expert) -> dict[str, Any] | None:
    """The record of the vocabulary of an expert's parent; None for the seed's."""
    if expert.parent == SEED:
        return None
    return run.registry().expert(*parse_reference(expert.parent)).vocabulary


def with_vocabulary(
    run: Run, expert: Expert, store: Store, contents: Contents, options: GrowOptions
) -> Expert:
    """A new grown expert with the record of its vocabulary: its parent's, or that extended as the
    options say. Makes the tokenizer, and the text in its ids, beside those of `store`, the
    expert's text in the seed's ids."""
    if options.extend_vocabulary is None:
        expert = replace(expert, vocabulary=_of_parent(run, expert))
        add_pieces(run, expert, [store], contents, workers=options.workers)
        return expert
    (name,) = expert.texts
    _learn(run, store, contents, options.extend_vocabulary)
    record = {
        "pieces": options.extend_vocabulary,
        "initialise": options.initialise or DEFAULT_METHOD,
        "text": name,
    }
    expert = replace(expert, vocabulary=record)
    add_pieces(run, expert, [store], contents, workers=options.workers, new={name: store})
    own = open_store(place_in(store.directory, key_of(store.directory / FOLDER)))
    spelled = [_tokens_per_character(one) for one in (store, own)]
    print(
        f"{name}: {spelled[0]:.3f} tokens a character; with {options.extend_vocabulary:,} more "
        f"pieces {spelled[1]:.3f}",
        file=sys.stderr,
    )
    return replace(expert, vocabulary={**record, "tokens_per_character": spelled})


def _tokens_per_character(store: Store) -> float:
    """Mean number of tokens a character of the languages of a store."""
    return round(fmean(each.tokens_per_character for each in text_stats(store).values()), 4)


def tokenizer_folder(
    run: Run, expert: Expert, new: Mapping[str, Store] | None = None
) -> Path | None:
    """Folder with the tokenizer of an expert that has a vocabulary of its own, published or not;
    None for the seed's. new: stores by name that are not in the RUN yet."""
    if expert.vocabulary is None:
        return None
    name = expert.vocabulary["text"]
    store = (new or {}).get(name)
    folder = store.directory if store else run.directory / "corpus" / name
    known, registry = [folder / FOLDER, expert.directory(run.directory)], run.registry()
    if expert.parent != SEED:
        known.append(registry.expert(*parse_reference(expert.parent)).directory(run.directory))
    # The parent may have been removed, with the text that the pieces were learned on.
    before = [e for e in registry.experts if e.name == expert.name and e.vocabulary]
    known += [each.directory(run.directory) for each in before]
    found = (each for each in map(root, known) if (each / "tokenizer.json").is_file())
    place = next((each for each in found if key_of(each) != key_of(run.seed)), None)
    if place is None:
        raise UserError(f"the tokenizer of {expert.reference} is missing; wanted {folder / FOLDER}")
    return place


def read_by(
    run: Run, expert: Expert, text: TrainingText, new: Mapping[str, Store] | None = None
) -> TrainingText:
    """The text of an expert in ids of its vocabulary."""
    folder = tokenizer_folder(run, expert, new)
    if folder is None:
        return text
    key = key_of(folder)
    return TrainingText(
        sources=sources_in_pieces(text.sources, key),
        held_out=sources_in_pieces(text.held_out, key),
    )


def sources_in_pieces(sources: Iterable[LanguageShare], key: str) -> list[LanguageShare]:
    """Some sources in ids of a vocabulary, as far as they were tokenised by it."""
    return [replace(source, ids=in_pieces_of(source.ids, key)) for source in sources]


def add_pieces(
    run: Run,
    expert: Expert,
    stores: Iterable[Store],
    contents: Contents,
    *,
    workers: int = 1,
    new: Mapping[str, Store] | None = None,
) -> None:
    """Tokenises some stores' documents again, by the tokenizer of an expert that has one of its
    own. contents: has these documents. new: as in `tokenizer_folder`."""
    folder = tokenizer_folder(run, expert, new)
    if folder is None:
        return
    for store in stores:
        in_vocabulary(run, store, contents, folder, workers=workers)


def in_vocabulary(
    run: Run, store: Store, contents: Contents, folder: Path, *, workers: int = 1
) -> Store:
    """The documents of a store in ids of another vocabulary, tokenised now unless they are there.
    contents: has these documents. folder: has the tokenizer. UserError if the contents have
    changed."""
    vocabulary = vocabulary_of(run, folder)
    assert vocabulary is not None
    place = place_in(store.directory, vocabulary.key)
    facts = {
        "corpus_sha256": store.record["corpus_sha256"],
        "tokenizer_sha256": sha256(folder / "tokenizer.json"),
    }
    if not (place / "store.json").exists():
        reading = Reading(contents)
        with bar(None, f"tokenise {store.directory.name} again", "doc") as progress:
            build_store(
                place,
                _documents(reading, store),
                vocabulary.tokenizer,
                reading.unusable,
                languages=list(store.languages),
                facts=facts,
                workers=workers,
                drop_duplicates=_unique(store),
                progress=progress.update,
            )
    found = open_store(place)
    for tag, ids in store.languages.items():
        if not np.array_equal(found.languages[tag].hashes, ids.hashes):
            shutil.rmtree(place)
            raise UserError(f"{contents.corpus} has changed while it was tokenised; run this again")
    return found


def _unique(store: Store) -> bool:
    """Whether no document of a store is there twice."""
    return all(len(np.unique(i.hashes, axis=0)) == len(i) for i in store.languages.values())


def _documents(reading: Reading, store: Store) -> Iterator[Document]:
    """The documents of a reading that are in a store."""
    known = {tag: {*ids.hashes[:, 0].tolist()} for tag, ids in store.languages.items()}
    for document in reading.documents():
        if int(text_hashes([document.text])[0, 0]) in known.get(document.language, ()):
            yield document


def _learn(run: Run, store: Store, contents: Contents, count: int) -> None:
    """Learns so many pieces on the documents of a store that are not held out, unless they are
    there, and keeps the tokenizer in its folder."""
    folder, first = store.directory / FOLDER, _first_new(run)
    if folder.is_dir():
        if (there := vocabulary_of(run, folder)) and there.size == first + count:
            return
        shutil.rmtree(folder)
    away = {*held_out_hashes(store.languages.values(), run.config.held_out).tolist()}
    sample = EvenSample(LEARNED_BYTES)
    for document in _documents(Reading(contents), store):
        if int(text_hashes([document.text])[0, 0]) not in away:
            sample.add(document.text)
    print(f"learning {count:,} pieces", file=sys.stderr, flush=True)
    with all_or_nothing(folder) as partial:
        extend(run.tokenizer(), run.seed, sample.documents, count, first, partial)


def start_of(
    run: Run, expert: Expert, parent: Path, new: Mapping[str, Store] | None = None
) -> Path:
    """The checkpoint that a training starts from: its parent's or, where that lacks the expert's
    pieces, the one that `write_start` makes."""
    folder = tokenizer_folder(run, expert, new)
    if folder is None or key_of(folder) == key_of(root(parent)):
        return parent
    return run.training(expert.name) / START


def weights_of(method: str, vocabulary: Vocabulary, documents: Iterable[np.ndarray]) -> Combination:
    """What the rows of new pieces are made of, by a method of `vocabulary_rows`. documents: the new
    text in ids of the vocabulary, by which pieces are compared."""
    mean = mean_weights(vocabulary.expansions, vocabulary.base_size)
    made = METHODS[method]
    if made is None:
        return mean
    read, left = [], COMPARED_TOKENS
    for ids in documents:
        read.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return made(*auxiliary_vectors(read, vocabulary.size), mean)


def write_start(run: Run, expert: Expert, parent: Path, sources: Sequence[LanguageShare]) -> None:
    """Writes the checkpoint that the training of an expert with an extended vocabulary starts from,
    unless it is there. sources: text in its ids, by which new pieces are compared with old ones."""
    folder, target = tokenizer_folder(run, expert), run.training(expert.name) / START
    if folder is None or target.exists():
        return
    assert expert.vocabulary is not None
    vocabulary, model = vocabulary_of(run, folder), read_config(parent)
    assert vocabulary is not None
    documents = (
        source.ids.document(int(number))
        for source in sources
        for number in (range(len(source.ids)) if source.documents is None else source.documents)
    )
    weights = weights_of(expert.vocabulary["initialise"], vocabulary, documents)
    parameters = with_new_rows(load_parameters(parent, model), vocabulary.base_size, weights)
    write_checkpoint(
        target,
        resized(model, vocabulary.size),
        parameters,
        source={**read_hub_config(parent), "vocab_size": vocabulary.size},
        tokenizer=folder,
        dtype=stored_dtype(parent),
    )
