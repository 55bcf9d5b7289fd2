"""Seed of a RUN: a checkpoint that is checked and copied, or a tokenizer and a model that are
trained on the corpus."""

import functools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from clustering.errors import UserError
from clustering.hub_files import weight_files
from xelm.config import RunConfig, StartToken
from xelm.data import tokenizer as tokenizers
from xelm.data import tokenizer_training
from xelm.data.contents import Contents
from xelm.data.parts import no_documents
from xelm.data.reading import Reading
from xelm.data.store import Store
from xelm.data.tokenizer import Tokenizer
from xelm.inference.sampling import read_sampling_params
from xelm.models.checkpoint import all_or_nothing, check_checkpoint, write_checkpoint
from xelm.models.config import ModelConfig
from xelm.models.families import hub_config
from xelm.models.parameters import fresh_parameters
from xelm.models.weights import tensor_without_numbers
from xelm.runs.origin import licence_of
from xelm.runs.run import Run
from xelm.runs.shares import all_text, with_passes
from xelm.training.loop import train
from xelm.training.metrics import HELD_OUT, METRICS
from xelm.training.trainer import TrainingSpec
from xelm.training_config import TrainConfig


def check_seed(
    source: Path, start_token: StartToken, parts: Mapping[str, TrainConfig]
) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a checkpoint that is to be a seed; UserError names everything that is
    wrong with it for these trainings."""
    model, tokenizer = check_checkpoint(source), None
    faults = length_faults(parts, model)
    try:
        tokenizer = tokenizers.load(source, start_token)
        if tokenizer.rows() > model.vocabulary_size:
            faults.append(
                f"the tokenizer of {source} has {tokenizer.rows()} ids, its embedding "
                f"{model.vocabulary_size} rows"
            )
        if not model.causal:
            tokenizer.check_mask()
    except UserError as error:
        faults.append(str(error))
    faults += [
        f"{tensor} in {file} has NaN or infinite values"
        for file in (source / name for name in weight_files(source))
        if (tensor := tensor_without_numbers(file)) is not None
    ]
    if faults:
        raise UserError("; ".join(faults))
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


def train_tokenizer(run: Run, contents: Contents) -> None:
    """Trains a tokenizer on the corpus unless there is one. UserError if a language has no text."""
    target = run.training("tokenizer")
    if (target / "tokenizer.json").exists() or run.seed.exists():
        return
    config, reading = run.config, Reading(contents)
    vocabulary_size = fresh_model(config).vocabulary_size
    # Documents beyond what a tokenizer learns from are not held in memory.
    most_bytes = 2 * tokenizer_training.TRAINING_BYTES // len(run.languages)
    samples = {language: tokenizer_training.EvenSample(most_bytes) for language in run.languages}
    for document in reading.documents():
        samples[document.language].add(document.text)
    missing = [language for language, sample in samples.items() if not sample.documents]
    if missing:
        raise no_documents(missing, reading.unusable)
    print(f"training a tokenizer of {vocabulary_size} pieces", file=sys.stderr)
    with all_or_nothing(target) as partial:
        tokenizer_training.train(
            {language: sample.documents for language, sample in samples.items()},
            vocabulary_size,
            partial,
            algorithm=config.tokenizer_algorithm,
            sizes={language: sample.bytes for language, sample in samples.items()},
            exponent=config.tokenizer_exponent,
            random_seed=config.seed.random_seed,
        )


def train_seed(run: Run, store: Store) -> None:
    """Trains a fresh model on the corpus and writes it to RUN/seed, unless one is there."""
    if run.seed.exists():
        return
    config, work = run.config, run.training("seed")
    model, text = fresh_model(config), all_text(config.seed, store, config.held_out)
    training = TrainingSpec(
        label="seed",
        start=functools.partial(fresh_parameters, model, config.seed.random_seed),
        sources=text.sources,
        held_out=text.held_out,
        config=with_passes(config.seed, text.tokens),
        directory=work,
        logs=run.logs(run.seed),
    )
    trained = train(training, model, run.tokenizer().text_format)
    write_checkpoint(
        run.seed,
        model,
        trained.parameters,
        model_type=config.model_type,
        tokenizer=run.tokenizer_directory(),
        special_ids=tokenizer_training.SPECIAL_IDS,
        extra=[path for name in (METRICS, HELD_OUT) if (path := work / name).exists()],
    )
    shutil.rmtree(work, ignore_errors=True)


def fresh_model(config: RunConfig) -> ModelConfig:
    """Shape of the model that is trained as seed; UserError if the configuration has none."""
    if config.model is None:
        raise UserError("this preset has no model of its own; give a seed checkpoint with --seed")
    hub_config(config.model_type, config.model)
    return config.model


def length_faults(parts: Mapping[str, TrainConfig], model: ModelConfig) -> list[str]:
    """Faults in the lengths of rows of some trainings, with the settings that correct them."""
    longer = {
        f"{name}.sequence_length": part.sequence_length
        for name, part in parts.items()
        if part.sequence_length > model.max_length
    }
    if not longer:
        return []
    mended = " ".join(f"--set {name}={model.max_length}" for name in longer)
    return [
        f"{' and '.join(longer)} must be at most the model's max_length, {model.max_length}; got "
        f"{' and '.join(map(str, longer.values()))} (add {mended})"
    ]
