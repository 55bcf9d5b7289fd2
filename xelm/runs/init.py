"""`xelm init`: a RUN from a corpus, with a seed that is trained here or comes from elsewhere."""

import functools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clustering import codes, tfidf
from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.files import flush, sha256, write_arrays
from clustering.languages import canonical_all
from experts import manifest
from experts.lock import locked
from experts.registry import Registry
from experts.verify import hash_directory
from xelm.config import RunConfig, StartToken, TrainConfig
from xelm.data import tokenizer as tokenizers
from xelm.data import tokenizer_training
from xelm.data.contents import Contents, contents_of, languages_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.parts import no_documents
from xelm.data.reading import Reading
from xelm.data.rows import LanguageShare
from xelm.data.store import Store
from xelm.data.text_format import TextFormat
from xelm.data.text_stats import TextStats, duplicate_notes, text_stats, warnings
from xelm.data.tokenise import build_store, in_processes
from xelm.data.tokenizer import Tokenizer
from xelm.inference.sampling import read_sampling_params
from xelm.models.checkpoint import (
    check_checkpoint,
    copy_checkpoint,
    write_checkpoint,
)
from xelm.models.config import ModelConfig
from xelm.models.families import hub_config
from xelm.models.parameters import fresh_parameters
from xelm.models.weights import tensor_without_numbers, weight_files
from xelm.progress import bar
from xelm.runs.branch import branch, check_languages
from xelm.runs.budget import Plan, announce, check_disk, plan
from xelm.runs.origin import base_model_of, licence_of
from xelm.runs.run import Run, create_run, open_run, refuse_other_files
from xelm.runs.shares import shares_of
from xelm.training.loop import train
from xelm.training.trainer import TrainingSpec

# Documents that the TF-IDF vectors are fitted on, of all languages together.
VECTORISER_DOCUMENTS = 20_000
# Another command may be tokenising the same corpus, and then its work is used.
WAIT_SECONDS = 3600.0


def init(
    directory: str | Path,
    corpus: AnyCorpus,
    config: RunConfig,
    *,
    seed: str | Path | None = None,
    languages: Sequence[str] | None = None,
    clusters: Clustering | None = None,
    workers: int = 1,
    keep_duplicates: bool = False,
    base_model: str | None = None,
) -> Run:
    """Makes a RUN, or goes on with one that was interrupted: tokenizer, tokenised corpus, seed,
    TF-IDF vectoriser, registry, each written whole before the next begins.

    corpus: a folder, a file, a data set of the Hub, or what `Corpus.of` describes.
    seed: a Hugging Face checkpoint directory to copy; None trains a tokenizer and a seed on the
    corpus. languages: those of the corpus to use; None uses all. clusters: to branch on at once.
    base_model: the seed's name on the Hub, OWNER/NAME, for the cards of its experts; None takes it
    from the path of a seed in the cache of the Hub's library.
    workers: processes that tokenise more than a few thousand documents; 1 leaves it to this one.
    They read the program that calls this, which therefore begins under `if __name__ == "__main__"`.
    keep_duplicates: train on every document as often as it stands in the corpus; otherwise exact
    copies within a language are left out, here and when experts are grown.
    """
    given = _given(corpus, config, seed, languages, keep_duplicates, base_model)
    if clusters is not None:
        check_languages(given.contents.languages or (), clusters)
    with _fresh_lock(directory):
        run = create_run(directory, given.config, given.facts)
        if run.record.get("keep_duplicates", False) != keep_duplicates:
            raise UserError(f"{directory} was begun with --keep-duplicates; use it again")
        if seed is None or given.tokenizer is None:
            _train_tokenizer(run, given.contents)
        else:
            _copy_seed(run, Path(seed), given.tokenizer)
            _link_from_sibling(run, Path(seed).parent)
        tokenizer = _tokenizer(run)
        store = tokenise(run, given.contents, tokenizer, "train", workers=workers)
        plans = _plans(run, store, given.model)
        announce(plans)
        if seed is None:
            check_disk(run.directory, plans[:-1])
            _train_seed(run, store, tokenizer)
        _fit_vectoriser(run, store, tokenizer.size)
        manifest.record(run.directory, ["run.json", "vectoriser.npz"])
        if not (run.directory / "registry.json").exists():
            Registry(seed_path="seed", seed_sha256=hash_directory(run.seed)).save(run.directory)
    if clusters is not None:
        branch(run, clusters)
    return run


def plan_init(
    directory: str | Path,
    corpus: AnyCorpus,
    config: RunConfig,
    *,
    seed: str | Path | None = None,
    languages: Sequence[str] | None = None,
    workers: int = 1,
    keep_duplicates: bool = False,
) -> tuple[list[Plan], list[TextStats]]:
    """What the trainings of a RUN would cost, and its text. The tokenizer is trained, and the
    corpus tokenised, in a temporary folder; nothing else is written. Arguments as in `init`."""
    given = _given(corpus, config, seed, languages, keep_duplicates)
    with TemporaryDirectory() as folder:
        run = create_run(Path(folder) / "RUN", given.config, given.facts)
        if given.tokenizer is None:
            _train_tokenizer(run, given.contents)
        else:
            given.tokenizer.hub.save_pretrained(run.training("tokenizer"))
        store = tokenise(run, given.contents, _tokenizer(run), "train", workers=workers)
        plans = _plans(run, store, given.model)
        check_disk(Path(directory), plans[:-1])
        return plans, list(text_stats(store).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What a RUN is made of, checked."""

    contents: Contents
    """Contents of the corpus in the languages of the RUN."""
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer | None
    """Tokenizer of the seed that is given; None where one is trained."""
    facts: Mapping[str, Any]
    """For run.json."""


def _given(
    corpus: AnyCorpus,
    config: RunConfig,
    seed: str | Path | None,
    languages: Sequence[str] | None,
    keep_duplicates: bool,
    base_model: str | None = None,
) -> _Given:
    corpus = Corpus.of(corpus)
    tags = _languages(corpus, languages)
    contents = contents_of(corpus.pinned(), tags)
    parts, tokenizer = {"experts": config.experts, "grow": config.grow}, None
    if seed is None:
        if base_model is not None:
            raise UserError("--base-model names what --seed is on the Hub; there is no --seed")
        model = _model(config)
        _refuse(_length_faults({"seed": config.seed, **parts}, model))
    else:
        base_model = base_model_of(seed, base_model)
        model, tokenizer = _check_seed(Path(seed), config.start_token, parts)
        config = replace(config, model=None)  # the seed has one
    facts = {
        "languages": list(tags),
        "seed_from": None if seed is None else str(Path(seed).resolve()),
        "base_model": base_model,
        "corpus": contents.corpus.to_json(),
        "corpus_sha256": contents.fingerprint(),
        **({"keep_duplicates": True} if keep_duplicates else {}),
    }
    return _Given(contents=contents, config=config, model=model, tokenizer=tokenizer, facts=facts)


def _plans(run: Run, store: Store, model: ModelConfig) -> list[Plan]:
    """The training of the seed, if it is yet to come, and last that of all experts together, whose
    clusters are not known yet."""
    parts = {"experts": run.config.experts}
    if run.record["seed_from"] is None and not run.seed.exists():
        parts = {"seed": run.config.seed, **parts}
    return [
        plan(run, name, name, _sources(part, store), part, model) for name, part in parts.items()
    ]


def _sources(config: TrainConfig, store: Store) -> list[LanguageShare]:
    shares = shares_of(config, store.languages)
    return [LanguageShare(ids=ids, share=shares[tag]) for tag, ids in store.languages.items()]


def tokenise(
    run: Run,
    contents: Contents,
    tokenizer: Tokenizer,
    name: str,
    *,
    workers: int = 1,
    training: bool = True,
) -> Store:
    """The tokenised corpus RUN/corpus/`name`, made now if it is not there yet for these contents
    and this tokenizer. Records that are left out are reported on stderr. So are exact copies in
    text to train on, which are left out unless the RUN keeps them; in other text they stay."""
    drop = training and not run.record.get("keep_duplicates", False)
    with locked(run.directory, f"corpus-{name}", wait_seconds=WAIT_SECONDS):
        return _tokenise(run, contents, tokenizer, name, workers, training, drop)


def _tokenise(
    run: Run,
    contents: Contents,
    tokenizer: Tokenizer,
    name: str,
    workers: int,
    training: bool,
    drop_duplicates: bool,
) -> Store:
    directory = run.directory / "corpus" / name
    corpus, languages = contents.corpus, contents.languages
    facts = {
        "corpus": corpus.to_json(),
        "corpus_sha256": contents.fingerprint(),
        "tokenizer_sha256": sha256(_tokenizer_directory(run) / "tokenizer.json"),
        "language_codes": codes.VERSION,
        # Files may hold more languages than were asked for.
        "languages_wanted": None if languages is None else sorted(languages),
    }
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
            tokenizer,
            reading.unusable,
            languages=languages,
            facts=facts,
            encode=in_processes(tokenizer, workers) if workers > 1 else None,
            drop_duplicates=drop_duplicates,
            progress=progress.update,
        )
    print(reading.table(), file=sys.stderr)
    if reading.unusable:
        print(f"{corpus}: {reading.unusable}", file=sys.stderr)
    texts = text_stats(store)
    for line in [*duplicate_notes(texts, drop_duplicates), *(warnings(texts) if training else ())]:
        print(f"{corpus}: {line}", file=sys.stderr)
    return store


def _check_trained_on(store: Store, facts: Mapping[str, Any]) -> None:
    """Raises UserError unless a store, on whose documents and their numbers experts rest, holds
    what is asked for, by whichever version of xelm it was made."""
    before = {**store.record, "languages_wanted": sorted(store.languages)}
    differ = [
        f"{key} was {before.get(key)}, now {facts[key]}"
        for key in ("corpus_sha256", "tokenizer_sha256", "languages_wanted")
        if before.get(key) != facts[key]
    ]
    if differ:
        raise UserError(
            f"{store.directory} is the text that experts are trained on, and is not made again: "
            f"{'; '.join(differ)}"
        )


def _languages(corpus: Corpus, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if wanted is not None:
        if not wanted:
            raise UserError("--languages names no language; wanted those of the corpus to use")
        return canonical_all(wanted)
    return canonical_all(languages_of(corpus))


def _model(config: RunConfig) -> ModelConfig:
    if config.model is None:
        raise UserError("this preset has no model of its own; give a seed checkpoint with --seed")
    hub_config(config.model_type, config.model)
    return config.model


def _length_faults(parts: Mapping[str, TrainConfig], model: ModelConfig) -> list[str]:
    """What is wrong with the lengths of rows in some trainings, with the settings that mend it."""
    lengths = {f"{name}.sequence_length": part.sequence_length for name, part in parts.items()}
    longer = {name: length for name, length in lengths.items() if length > model.max_length}
    if not longer:
        return []
    mended = " ".join(f"--set {name}={model.max_length}" for name in longer)
    return [
        f"{' and '.join(longer)} must be at most the model's max_length, {model.max_length}; got "
        f"{' and '.join(map(str, longer.values()))} (add {mended})"
    ]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError("; ".join(faults))


def _fresh_lock(directory: str | Path):
    """The lock of a RUN that may not exist yet."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"{directory} is a file; give a new or empty directory")
    refuse_other_files(path)
    path.mkdir(parents=True, exist_ok=True)
    return locked(path, "init")


def _tokenizer_directory(run: Run) -> Path:
    return run.seed if (run.seed / "tokenizer.json").exists() else run.training("tokenizer")


def _tokenizer(run: Run) -> Tokenizer:
    return tokenizers.load(_tokenizer_directory(run), run.config.start_token)


def _train_tokenizer(run: Run, contents: Contents) -> None:
    target = run.training("tokenizer")
    if (target / "tokenizer.json").exists() or run.seed.exists():
        return
    config, reading = run.config, Reading(contents)
    vocabulary_size = _model(config).vocabulary_size
    # Documents beyond what a tokenizer learns from are not held in memory.
    most_bytes = 2 * tokenizer_training.TRAINING_BYTES // len(run.languages)
    samples = {language: tokenizer_training.EvenSample(most_bytes) for language in run.languages}
    for document in reading.documents():
        samples[document.language].add(document.text)
    missing = [language for language, sample in samples.items() if not sample.documents]
    if missing:
        raise no_documents(missing, reading.unusable)
    print(f"training a tokenizer of {vocabulary_size} pieces", file=sys.stderr)
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer_training.train(
            {language: sample.documents for language, sample in samples.items()},
            vocabulary_size,
            partial,
            sizes={language: sample.bytes for language, sample in samples.items()},
            exponent=config.tokenizer_exponent,
            random_seed=config.seed.random_seed,
        )
        flush(partial)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train_seed(run: Run, store: Store, tokenizer: Tokenizer) -> None:
    if run.seed.exists():
        return
    config = run.config
    training = TrainingSpec(
        label="seed",
        start=functools.partial(fresh_parameters, _model(config), config.seed.random_seed),
        sources=_sources(config.seed, store),
        config=config.seed,
        directory=run.training("seed"),
        logs=run.logs(run.seed),
    )
    text = TextFormat(start_id=tokenizer.start_id, end_id=tokenizer.end_id)
    trained = train(training, _model(config), text)
    write_checkpoint(
        run.seed,
        _model(config),
        trained.parameters,
        model_type=config.model_type,
        tokenizer=_tokenizer_directory(run),
        special_ids=tokenizer_training.SPECIAL_IDS,
        extra=[run.training("seed") / "metrics.jsonl"],
    )
    shutil.rmtree(run.training("seed"), ignore_errors=True)


def _check_seed(
    source: Path, start_token: StartToken, parts: Mapping[str, TrainConfig]
) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a seed; UserError with all that is wrong with it for these
    trainings."""
    model, tokenizer = check_checkpoint(source), None
    faults = _length_faults(parts, model)
    try:
        tokenizer = tokenizers.load(source, start_token)
        if tokenizer.rows() > model.vocabulary_size:
            faults.append(
                f"the tokenizer of {source} has {tokenizer.rows()} ids, its embedding "
                f"{model.vocabulary_size} rows"
            )
        if not model.causal:
            tokenizer.masking()
    except UserError as error:
        faults.append(str(error))
    faults += [
        f"{tensor} in {file} holds values that are no numbers"
        for file in (source / name for name in weight_files(source))
        if (tensor := tensor_without_numbers(file)) is not None
    ]
    _refuse(faults)
    assert tokenizer is not None  # or there was a fault
    licence_of(source)
    if tokenizer.ignored:
        ids = ", ".join(map(str, tokenizer.ignored))
        print(
            f"{source}: its configuration names {ids} as bos or eos, which the tokenizer reads as "
            "text; the tokenizer's own special tokens are used",
            file=sys.stderr,
        )
    if model.causal and (unknown := read_sampling_params(source)[1]):
        print(
            f"{source}/generation_config.json: no use is made of {', '.join(unknown)}",
            file=sys.stderr,
        )
    return model, tokenizer


def _copy_seed(run: Run, source: Path, tokenizer: Tokenizer) -> None:
    if run.seed.exists():
        return
    copy_checkpoint(source, run.seed, tokenizer.hub.save_pretrained)


def _link_from_sibling(run: Run, sibling: Path) -> None:
    """Where the seed is that of another RUN on the same corpus, its tokenised corpus and vectors
    are linked instead of made again: many RUNs can start from one seed at the cost of one."""
    if not (sibling / "run.json").exists() or (run.directory / "corpus" / "train").exists():
        return
    other = open_run(sibling, finished=False)
    same = ("corpus_sha256", "languages", "keep_duplicates")
    if any(other.record.get(key) != run.record.get(key) for key in same):
        return
    if other.config.vectoriser_dimensions != run.config.vectoriser_dimensions:
        return
    if not (other.directory / "corpus" / "train" / "store.json").exists():
        return
    if other.store().fingerprints() is None:  # of an earlier version, which dropped no copies
        return
    target = run.directory / "corpus" / "train"
    partial = target.with_name(".train.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(sibling / "corpus" / "train", partial, copy_function=_link)
        _link(sibling / "vectoriser.npz", run.directory / "vectoriser.npz")
    except FileNotFoundError:
        # The sibling is not finished: what it lacks is made here.
        shutil.rmtree(partial, ignore_errors=True)
        return
    flush(partial)
    partial.rename(target)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where file systems do not allow that. Files of a store
    are replaced and never changed, so both names are safe."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _fit_vectoriser(run: Run, store: Store, vocabulary_size: int) -> None:
    if (run.directory / "vectoriser.npz").exists():
        return
    print("fitting TF-IDF vectors", file=sys.stderr)
    # As many of each language, evenly spaced: terms of small languages must be known too.
    most = -(-VECTORISER_DOCUMENTS // len(store.languages))
    documents = (
        ids.document(number)
        for ids in store.languages.values()
        for number in range(0, len(ids), -(-len(ids) // most))
    )
    fitted = tfidf.fit(
        documents,
        vocabulary_size,
        run.config.vectoriser_dimensions,
        run.config.seed.random_seed,
    )
    write_arrays(
        run.directory / "vectoriser.npz", {"idf": fitted.idf, "projection": fitted.projection}
    )
    manifest.record(run.directory, ["vectoriser.npz"], again=True)
