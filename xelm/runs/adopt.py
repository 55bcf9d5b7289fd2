"""`xelm adopt`: a checkpoint, or an adapter of PEFT, that was trained elsewhere becomes an expert
of a RUN, or the next version of one. Its files are checked and copied; no code in them is run."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from clustering.errors import UserError
from clustering.files import read_object, sha256
from clustering.hub_files import weight_files
from clustering.languages import canonical_all
from experts.adopt import adopt as adopt_registry
from experts.adopt import parent_of
from experts.begin import begin
from experts.expert import SEED, Expert, is_reference, parse_reference
from experts.lock import locked, update
from experts.registry import Registry
from xelm.data import tokenizer as tokenizers
from xelm.data.contents import contents_in
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.data.unusable import UnusableRecords
from xelm.models.checkpoint import README, read_config, stored_dtype
from xelm.models.difference import store
from xelm.models.foreign import (
    check_adapter,
    code_of,
    copy_adapter,
    copy_foreign,
    declared_base,
    dtypes_of,
    faults_of,
    files_of,
    is_adapter,
)
from xelm.models.stored import base_hashes, root
from xelm.runs import train
from xelm.runs.jobs import already_begun
from xelm.runs.language import check_language
from xelm.runs.options import AdoptOptions
from xelm.runs.origin import licence_of
from xelm.runs.publish import publish, write_centre
from xelm.runs.run import Run
from xelm.runs.shares import expert_text, parent_directory, unused_text
from xelm.runs.text import elsewhere, tokenise
from xelm.runs.vocabulary import add_pieces, vocabulary_of

BY_TEXT = ("learned", "tfidf", "detected")
"""Routings that know an expert by text in its languages."""
# Parts of a tokenizer that decide how a text is cut.
_CUTTING = ("normalizer", "pre_tokenizer", "model", "added_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """A checkpoint that was checked, and the expert that it is to become."""

    expert: Expert
    checks: dict[str, str]
    """What was checked -> what was found, one line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """What an adoption needs."""

    expert: Expert
    """Its record, which is not in the registry where the adoption is to begin."""
    checks: dict[str, str]
    dtype: str | None
    """Dtype to which its weights are rounded; None: they stay as they are."""


def adopt(
    run: Run,
    checkpoint: str | Path,
    languages: Sequence[str] = (),
    corpus: AnyCorpus | None = None,
    options: AdoptOptions | None = None,
    *,
    origin: Mapping[str, str] | None = None,
) -> Expert:
    """Makes an expert of a checkpoint that was trained elsewhere, and publishes it if it passes the
    gate; no other expert changes.

    checkpoint: a directory with config.json and safetensors, of the shape and the vocabulary of the
    RUN's models, or with adapter_config.json and adapter_model.safetensors, a LoRA of one of them.
    languages: those that the expert serves; none for the next version of an expert, which is named
    in `options`. corpus: text in these languages, by which routers find the expert, and of which a
    part is held out to compare it with its parent; None: that of the RUN, as far as it has any.
    origin: where the record says that the checkpoint is from, "from", a repository of the Hub, and
    "commit", its commit; None: its directory. UserError names everything that is wrong with the
    checkpoint, and nothing is changed then. An expert that does not pass the gate stays in
    training, as in `publish`.
    """
    source, options = Path(checkpoint), options or AdoptOptions()
    name = _name(languages, options)
    with locked(run.directory, f"train-{name}"):
        found = _prepared(run, source, languages, corpus, options, run, origin)
        expert = found.expert
        for what, line in found.checks.items():
            print(f"{what}: {line}", file=sys.stderr)
        update(run.directory, lambda registry: begin(registry, expert), "adopt")
        target = expert.directory(run.directory)
        if not target.exists():
            sources = expert_text(run, expert).sources
            extra = [write_centre(run, name, sources)] if sources else []
            _write(run, source, expert, found.dtype, extra)
            shutil.rmtree(run.training(name), ignore_errors=True)
        return publish(run, expert)


def _write(
    run: Run, source: Path, expert: Expert, dtype: str | None, extra: Sequence[Path]
) -> None:
    """Writes the files of an expert, with those in `extra`: complete, or what it differs in from
    its parent."""
    parent, target = parent_directory(run, expert), expert.directory(run.directory)
    if is_adapter(source):
        copy_adapter(source, target, parent, extra=extra)
        return
    whole = run.training(expert.name) / "whole"
    shutil.rmtree(whole, ignore_errors=True)  # of a call that was interrupted
    like = run.seed if expert.vocabulary is None else root(parent)
    copy_foreign(source, whole, like, dtype=dtype, extra=extra)
    store(whole, parent, target, extra=extra)


def plan_adoption(
    run: Run,
    checkpoint: str | Path,
    languages: Sequence[str] = (),
    corpus: AnyCorpus | None = None,
    options: AdoptOptions | None = None,
) -> Adoption:
    """What `adopt` would make, and what was checked; nothing in the RUN changes. UserError where
    `adopt` raises it before the expert is compared with its parent."""
    options = options or AdoptOptions()
    with elsewhere(run) as place:
        found = _prepared(run, Path(checkpoint), languages, corpus, options, place)
    return Adoption(expert=found.expert, checks=found.checks)


def _name(languages: Sequence[str], options: AdoptOptions) -> str:
    if options.name is None and not languages:
        raise UserError("name the languages of the new expert, such as --languages sv")
    return options.name or "-".join(canonical_all(languages))


def _prepared(
    run: Run,
    source: Path,
    languages: Sequence[str],
    corpus: AnyCorpus | None,
    options: AdoptOptions,
    place: Run,
    origin: Mapping[str, str] | None = None,
) -> _Prepared:
    """Everything that is checked before an adoption begins; text is tokenised in `place`."""
    registry, name = run.registry(), _name(languages, options)
    adapter = is_adapter(source)
    parent, why = (_base_of if adapter else _parent_of)(run, registry, source, options.parent)
    base = _base(run, registry, parent)
    if adapter:
        checks, dtype, like = _checked_adapter(run, source, base), None, base
    else:
        like = _like(run, source, base)
        checks, dtype = _checked(run, source, like)
    made = {
        "by": "adopt",
        **(origin or {"from": str(source)}),
        "sha256": {file: sha256(source / file) for file in files_of(source)},
        "dtype": " ".join(dtypes_of(source)),
    }
    if licence := licence_of(source):
        made["licence"] = licence
    checks["parent"] = why
    if (begun := registry.unfinished(name)) is not None:
        _check_same(run, begun, made, parent, corpus)
        return _Prepared(expert=begun, checks=checks, dtype=dtype)
    facts: dict[str, Any] = {"made": made}
    if like != run.seed and (reference := parent_of(registry, parent)) != SEED:
        facts["vocabulary"] = registry.expert(*parse_reference(reference)).vocabulary
    expert = adopt_registry(registry, languages, parent, options.name, **facts).experts[-1]
    train.check_parents(run, [base])
    store, corpora = _text(run, registry, expert, corpus, options, place)
    if corpora:
        facts["corpora"] = corpora
        expert = adopt_registry(registry, languages, parent, options.name, **facts).experts[-1]
    checks["text"] = _text_line(run, expert, store)
    return _Prepared(expert=expert, checks=checks, dtype=dtype)


def _text_line(run: Run, expert: Expert, new: Store | None) -> str:
    """What is said of the text of an expert. new: a store that may not be in the RUN."""
    known: set[str] = set()
    for text in expert.texts:
        store = new if new is not None and new.directory.name == text else run.store(text)
        known |= {*store.languages}
    missing = [tag for tag in expert.languages if tag not in known]
    if not missing:
        return ", ".join(f"corpus/{text}" for text in expert.texts)
    some = len(missing) < len(expert.languages)
    return (
        f"none in {', '.join(missing)}, in the RUN or from --corpus: the expert is not compared "
        f"with its parent {'there' if some else ''}".rstrip()
        + f", and routing by text ({', '.join(BY_TEXT)}) does not choose it"
        + (" for it" if some else "")
        + "; routing by language does, and mixtures of all experts include it"
    )


def _base(run: Run, registry: Registry, parent: str) -> Path:
    """Directory of the model of a RUN that is a parent; UserError if it has no weights."""
    reference = parent_of(registry, parent)
    if reference == SEED:
        return run.seed
    return registry.expert(*parse_reference(reference)).directory(run.directory)


def _like(run: Run, source: Path, parent: Path) -> Path:
    """The model whose shape and vocabulary a checkpoint is to have: its parent, where that has more
    pieces than the seed and the checkpoint as many, and otherwise the seed."""
    size, extended = read_config(source).vocabulary_size, vocabulary_of(run, parent) is not None
    return parent if extended and size == read_config(parent).vocabulary_size else run.seed


def _checked(run: Run, source: Path, like: Path) -> tuple[dict[str, str], str | None]:
    """What was found of a checkpoint, and the dtype to which it is to be rounded, if to any;
    UserError names everything that is wrong with it. like: as `_like` found it."""
    shape = read_config(like)
    faults = faults_of(source, shape)
    try:
        vocabulary = _vocabulary(run, source, like)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    config = run.config.weights_dtype
    wanted, given = stored_dtype(run.seed) if config == "seed" else config, dtypes_of(source)
    rounded = given != (wanted,)
    checks = {
        "shape": f"{shape.layer_count} layers of width {shape.width}, as the seed's",
        "vocabulary": vocabulary,
        "values": "all finite",
        "dtype": f"{' '.join(given)}; "
        + (f"rounded to {wanted}, the RUN's" if rounded else "kept bit for bit"),
    }
    if code := code_of(source):
        checks["code"] = f"{', '.join(code[:5])}: neither run nor copied"
    return checks, wanted if rounded else None


def _checked_adapter(run: Run, source: Path, base: Path) -> dict[str, str]:
    """What was found of an adapter; UserError for what is wrong with it. base: the model that it is
    for."""
    train.check_parents(run, [base])
    described = check_adapter(source, base)
    return {
        "adapter": described,
        "vocabulary": _vocabulary(run, source, base),
        "values": "all finite",
        "dtype": f"{' '.join(dtypes_of(source))}; kept bit for bit",
    }


def _base_of(run: Run, registry: Registry, source: Path, given: str | None) -> tuple[str, str]:
    """Reference of the model that an adapter is for, and how it is known; UserError where it says
    that it is for another model than those of the RUN, or than the given one."""
    name, seed = declared_base(source), run.record.get("base_model")
    found = _model_called(run, registry, name)
    if given is not None:
        known = base_hashes(_base(run, registry, given))
        if found is not None and known != base_hashes(_base(run, registry, found)):
            raise UserError(f"{source} is an adapter of {found}, as it says; got --parent {given}")
        return given, f"{given}, as given"
    if found is not None:
        return found, f"{found}, which the adapter names as its base"
    if name and name == seed:
        return SEED, f"seed, which is {name}, the base that the adapter names"
    if name and (seed or Path(name).is_dir()):
        own = f"the seed is {seed}" if seed else "no model of the RUN has its weights"
        raise UserError(
            f"{source} is an adapter of {name}, and {own}; if it is the same model, name it with "
            "--parent, such as --parent seed"
        )
    return SEED, f"seed; it is not known whether that is {name or 'its base, which is not named'}"


def _vocabulary(run: Run, source: Path, like: Path) -> str:
    """What is said of the tokenizer of a checkpoint; UserError for another than that of the RUN or,
    where `like` has more pieces, of that model."""
    more = vocabulary_of(run, like)
    own, whose = (more.tokenizer, "its parent") if more else (run.tokenizer(), "the RUN")
    size = f"{read_config(like).vocabulary_size} ids"
    if not tokenizers.has_tokenizer(source):
        return f"{size}; the checkpoint brings no tokenizer, and gets that of {whose}"
    theirs = tokenizers.load(source, run.config.start_token)
    pieces, others = own.hub.get_vocab(), theirs.hub.get_vocab()
    if differing := sorted(p for p in {*pieces, *others} if pieces.get(p) != others.get(p)):
        piece = differing[0]
        raise UserError(
            f"the tokenizer of {source} is not that of {whose}: {len(differing)} pieces differ, "
            f"such as {piece!r}, which is {others.get(piece, 'missing')} there and "
            f"{pieces.get(piece, 'missing')} in that of {whose}"
        )
    parts = [json.loads(each.hub.backend_tokenizer.to_str()) for each in (own, theirs)]
    if other := [key for key in _CUTTING if parts[0].get(key) != parts[1].get(key)]:
        raise UserError(
            f"the tokenizer of {source} has the pieces of that of {whose} and cuts text otherwise: "
            f"{', '.join(other)} of tokenizer.json differ"
        )
    return f"{size}, and a tokenizer equal to that of {whose}"


def _parent_of(run: Run, registry: Registry, source: Path, given: str | None) -> tuple[str, str]:
    """Reference of the model that a checkpoint was trained from, and how it is known."""
    if given is not None:
        return given, f"{given}, as given"
    for place, name in _declared(source):
        if (found := _model_called(run, registry, name)) is not None:
            return found, f"{found}, which {place} names"
    return SEED, "seed; the checkpoint names no model of the RUN, and --parent is not given"


def _declared(source: Path) -> Iterator[tuple[str, str]]:
    """File of a checkpoint, and a model that it says the checkpoint was trained from."""
    for file, key in (("config.json", "_name_or_path"),):
        if (source / file).is_file():
            yield file, str(read_object(source / file).get(key) or "")
    if (source / README).is_file():
        try:
            found = (metadata_load(source / README) or {}).get("base_model") or []
        except Exception:  # its front matter is no YAML: what it says is no part of the weights
            found = []
        for name in [found] if isinstance(found, str) else found:
            yield README, str(name)


def _model_called(run: Run, registry: Registry, name: str) -> str | None:
    """Reference of the model of a RUN that is called so: NAME@v1, or a directory with its
    weights; None if there is none."""
    if is_reference(name):
        wanted, version = parse_reference(name)
        known = [e for e in registry.experts if (e.name, e.version) == (wanted, version)]
        return name if known and known[0].sha256 else None
    if not name or not Path(name).is_dir():
        return None
    try:
        weights = {file: sha256(Path(name) / file) for file in weight_files(name)}
    except (UserError, OSError):
        return None
    if weights.items() <= registry.seed_sha256.items():
        return SEED
    with_them = [e for e in registry.experts if weights.items() <= e.sha256.items()]
    return with_them[-1].reference if with_them else None


def _check_same(
    run: Run, begun: Expert, made: dict[str, Any], parent: str, corpus: AnyCorpus | None
) -> None:
    """Raises UserError unless an expert in training is of this very adoption, so that it can go
    on."""
    how = begun.made or {}
    same = how.get("by") == "adopt" and how.get("sha256") == made["sha256"]
    if same and parent in (begun.parent, begun.parent.partition("@")[0]) and corpus is None:
        return
    same_text = "; go on without --corpus, and with the same --parent"
    raise already_begun(run, begun, same_text if same else ", as something else; finish it")


def _text(
    run: Run,
    registry: Registry,
    expert: Expert,
    corpus: AnyCorpus | None,
    options: AdoptOptions,
    place: Run,
) -> tuple[Store | None, tuple[str, ...]]:
    """Text that is added for an expert, and the names of its tokenised corpora beside those that
    its record has: of `corpus`, or else of the RUN's, which may have been tokenised already."""
    first, tags = all(expert.name != e.name for e in registry.experts), list(expert.languages)
    if corpus is None and not first:
        return None, ()  # that of the version before
    if corpus is not None and expert.documents is not None:
        raise UserError(
            f"{expert.name} is the expert of a cluster of documents, whose text is that of the "
            "RUN; leave --corpus out"
        )
    name = unused_text(registry, expert.name if first else f"{expert.name}-v{expert.version}")
    if corpus is not None:
        older = None if first else {text: run.store(text) for text in expert.texts}
        contents = contents_in(corpus, tags)
        store = tokenise(place, contents, name, workers=options.workers, older=older)
        check_language(run, store)
        add_pieces(run, expert, [store], contents, workers=options.workers)
        return store, (name,)
    known = [tag for tag in tags if run.has_text and tag in run.store().languages]
    corpora = ("train",) if known else ()
    store = None
    if (missing := [tag for tag in tags if tag not in known]) and (own := _own_corpus(run)):
        some = [tag for tag in missing if _has(own, tag)]
        if some:
            contents = contents_in(own, some)
            store = tokenise(place, contents, name, workers=options.workers)
            add_pieces(run, expert, [store], contents, workers=options.workers)
            corpora = (*corpora, name)
    return store, corpora


def _own_corpus(run: Run) -> Corpus | None:
    """The corpus that the RUN was made from, if it is still there."""
    own = Corpus.of(run.record["corpus"])
    return own if all(Path(source.path).exists() for source in own.sources) else None


def _has(corpus: Corpus, tag: str) -> bool:
    """Whether a corpus has files in a language."""
    try:
        contents = contents_in(corpus, [tag])
    except UserError:
        return False
    return any(True for _ in contents.first_documents([tag], 1, UnusableRecords()))
