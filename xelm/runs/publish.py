"""A trained model becomes a checkpoint in the RUN, and an expert is published in the registry."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clustering.files import replace as replace_file
from clustering.files import sha256, write_arrays
from experts import manifest
from experts.card import card
from experts.expert import Expert
from experts.lock import update
from experts.verify import hash_directory
from xelm.data.rows import LanguageShare
from xelm.models.checkpoint import README, read_config, stored_dtype, write_checkpoint
from xelm.models.config import ModelConfig
from xelm.runs.origin import origin_facts
from xelm.runs.run import Run
from xelm.training.metrics import read_metrics

CENTRE = "centre.npz"
"""Mean TF-IDF vector of an expert's documents, [D], by which TF-IDF routing finds it."""
CENTRE_DOCUMENTS = 2000
"""Largest number of documents of a language that a centre is the mean of: more hardly move it."""


def write_centre(run: Run, name: str, sources: Sequence[LanguageShare]) -> None:
    """Writes the mean TF-IDF vector of a training's documents, [D], among its files; each language
    counts by its share."""
    vectoriser = run.vectoriser()
    total = sum(source.share for source in sources)
    centre = np.zeros(vectoriser.dimensions)
    for source in sources:
        numbers = np.arange(len(source.ids)) if source.documents is None else source.documents
        step = -(-len(numbers) // CENTRE_DOCUMENTS)
        documents = (source.ids.document(int(number)) for number in numbers[::step])
        centre += source.share / total * vectoriser.transform(documents).mean(axis=0)
    write_arrays(run.training(name) / CENTRE, {"centre": centre.astype(np.float32)})


def write_model(
    run: Run,
    name: str,
    target: Path,
    model: ModelConfig,
    parameters: Mapping[str, Any],
    writes: bool,
) -> None:
    """Writes a trained model as the checkpoint `target`, rounded to the dtype of the seed's weights
    unless the configuration sets another, and deletes the training's own files. writes: whether
    this host writes."""
    work, dtype = run.training(name), run.config.weights_dtype
    write_checkpoint(
        target,
        model,
        parameters,
        like=run.seed,
        extra=[work / "metrics.jsonl", work / CENTRE],
        dtype=stored_dtype(run.seed) if dtype == "seed" else dtype,
        writes=writes,
    )
    if writes:
        shutil.rmtree(work, ignore_errors=True)


def publish(run: Run, expert: Expert, facts: Mapping[str, str | int | float]) -> None:
    """Adds the model card to a trained expert's files, and publishes it in the registry with their
    hashes. The card states the hashes of the other files. facts: further lines of the card."""
    directory = expert.directory(run.directory)
    tokens = read_metrics(directory / "metrics.jsonl")[-1]["tokens"]
    readme = directory / README
    readme.unlink(missing_ok=True)  # from a publication that was interrupted
    files = hash_directory(directory)
    described = replace(expert, sha256=files, tokens=tokens)
    facts = {**origin_facts(run), **facts}
    if run.settings:
        facts["set for its training"] = " ".join(run.settings)
    page = card(described, run.registry(), facts, masked=not read_config(run.seed).causal)
    replace_file(readme, lambda file: file.write(page.encode()))
    files[README] = sha256(readme)
    # Before the registry, since `verify` compares every published expert with this record.
    manifest.record_expert(run.directory, replace(described, sha256=files))
    update(
        run.directory,
        lambda registry: registry.publish(expert.name, expert.version, sha256=files, tokens=tokens),
    )
