"""`xelm init`: a RUN from a corpus, with a seed that is trained here or is a given checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from clustering.clustering import Clustering
from clustering.errors import UserError
from experts import manifest
from experts.history import event_of_now
from experts.lock import locked
from experts.registry import Registry
from experts.verify import hash_directory
from xelm.config import RunConfig
from xelm.data.contents import Contents, contents_in
from xelm.data.corpus import AnyCorpus
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.data.tokenizer import Tokenizer
from xelm.models.checkpoint import copy_checkpoint
from xelm.models.config import ModelConfig
from xelm.runs.branch import branch, check_languages
from xelm.runs.budget import Plan, announce, check_disk, plan
from xelm.runs.jobs import check_part
from xelm.runs.options import InitOptions
from xelm.runs.origin import base_model_of
from xelm.runs.run import Run, create_run, files_of_run
from xelm.runs.seed import check_seed, fresh_model, length_faults, train_seed, train_tokenizer
from xelm.runs.sentence_encoder import body_of
from xelm.runs.shares import all_text, with_passes
from xelm.runs.text import fit_vectoriser, link_from_sibling, tokenise


def init(
    directory: str | Path,
    corpus: AnyCorpus,
    config: RunConfig,
    options: InitOptions | None = None,
    *,
    clusters: Clustering | None = None,
) -> Run:
    """Makes a RUN, or resumes one that was interrupted: tokenizer, tokenised corpus, seed, TF-IDF
    vectoriser and registry, each written completely before the next begins.

    corpus: a folder, a file, a data set of the Hub, or what `Corpus.of` describes. options: None:
    the defaults. clusters: to branch on at once.
    """
    options, folder = options or InitOptions(), None
    if options.seed is not None:
        folder = Path(options.seed)
        base_model = base_model_of(folder, options.base_model)
        options = replace(options, seed=body_of(folder), base_model=base_model)
    given, seed = _given(corpus, config, options, clusters), options.seed
    files_of_run(directory)
    Path(directory).mkdir(parents=True, exist_ok=True)
    with locked(directory, "init"):
        run = create_run(directory, given.config, given.facts)
        if run.record.get("keep_duplicates", False) != options.keep_duplicates:
            raise UserError(f"{directory} was begun with --keep-duplicates; use it again")
        if seed is None or given.tokenizer is None:
            train_tokenizer(run, given.contents)
        else:
            if not run.seed.exists():
                save = given.tokenizer.hub.save_pretrained
                copy_checkpoint(seed, run.seed, save, card_in=folder)
            link_from_sibling(run, Path(seed).parent)
        store = tokenise(run, given.contents, "train", workers=options.workers)
        plans = _plans(run, store, given.model)
        announce(plans)
        if seed is None:
            check_disk(run.directory, plans[:-1])
            train_seed(run, store)
        fit_vectoriser(run, store)
        manifest.record(run.directory, ["run.json", "vectoriser.npz"])
        if not (run.directory / "registry.json").exists():
            made = event_of_now("init", {})
            hashes = hash_directory(run.seed)
            Registry(seed_path="seed", seed_sha256=hashes, history=(made,)).save(run.directory)
    if clusters is not None:
        branch(run, clusters)
    return run


def plan_init(
    directory: str | Path,
    corpus: AnyCorpus,
    config: RunConfig,
    options: InitOptions | None = None,
    *,
    clusters: Clustering | None = None,
) -> tuple[list[Plan], list[TextStats]]:
    """What the trainings of a RUN would cost, and its text. The tokenizer is trained, and the
    corpus tokenised, in a temporary folder; nothing else is written. Arguments as in `init`."""
    options = options or InitOptions()
    given = _given(corpus, config, options, clusters)
    with TemporaryDirectory() as folder:
        run = create_run(Path(folder) / "RUN", given.config, given.facts)
        if given.tokenizer is None:
            train_tokenizer(run, given.contents)
        else:
            given.tokenizer.hub.save_pretrained(run.training("tokenizer"))
        store = tokenise(run, given.contents, "train", workers=options.workers)
        plans = _plans(run, store, given.model)
        check_disk(Path(directory), plans[:-1])
        return plans, list(text_stats(store).values())


class _Given(NamedTuple):
    """The checked arguments of `init`."""

    contents: Contents
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer | None
    """Tokenizer of the seed that is given; None where one is trained."""
    facts: Mapping[str, Any]
    """What run.json records of the arguments."""


def _given(
    corpus: AnyCorpus, config: RunConfig, options: InitOptions, clusters: Clustering | None
) -> _Given:
    seed, base_model = options.seed, options.base_model
    if options.languages is not None and not options.languages:
        raise UserError("--languages names no language; wanted those of the corpus to use")
    contents = contents_in(corpus, options.languages)
    if clusters is not None:
        check_languages(contents.languages or (), clusters)
    parts, tokenizer = {"experts": config.experts, "grow": config.grow}, None
    if seed is None:
        if base_model is not None:
            raise UserError("--base-model names what --seed is on the Hub; there is no --seed")
        model = fresh_model(config)
        for fault in length_faults({"seed": config.seed, **parts}, model):
            raise UserError(fault)
    else:
        model, tokenizer = check_seed(Path(seed), config.start_token, parts)
        config = replace(config, model=None)  # the seed has one
    for name, part in parts.items():
        check_part(name, part, model)
    facts = {
        "languages": list(contents.languages or ()),
        "seed_from": None if seed is None else str(Path(seed).resolve()),
        "base_model": base_model,
        "corpus": contents.corpus.to_json(),
        "corpus_sha256": contents.fingerprint(),
        **({"keep_duplicates": True} if options.keep_duplicates else {}),
    }
    return _Given(contents, config, model, tokenizer, facts)


def _plans(run: Run, store: Store, model: ModelConfig) -> list[Plan]:
    """Costs of training the seed, if that is still to be done, and last of training all experts
    together, since their clusters are not known yet."""
    parts = {"experts": run.config.experts}
    if run.record["seed_from"] is None and not run.seed.exists():
        parts = {"seed": run.config.seed, **parts}
    return [
        plan(run, name, name, text.sources, with_passes(part, text.tokens), model)
        for name, part in parts.items()
        for text in [all_text(part, store, run.config.held_out)]
    ]
