"""A trained model becomes a checkpoint in the RUN, and an expert is published in the registry."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clustering.errors import UserError
from clustering.files import remove_unfinished, sha256, write_arrays
from clustering.files import replace as replace_file
from experts import manifest
from experts.card import card
from experts.expert import Expert
from experts.lock import locked, update
from experts.places import without_folders
from experts.verify import hash_directory
from xelm.data.held_out import TrainingText
from xelm.data.rows import LanguageShare
from xelm.models.adapters import Adapter, factors_of
from xelm.models.checkpoint import (
    README,
    read_config,
    stored_dtype,
    write_adapted,
    write_checkpoint,
)
from xelm.models.config import ModelConfig
from xelm.models.difference import store
from xelm.models.stored import stored_as
from xelm.models.weights import on_host
from xelm.runs.combined import RECIPE
from xelm.runs.gate import check_gate, evaluate_held_out, refusal_of
from xelm.runs.jobs import Job, expert_job
from xelm.runs.origin import origin_facts
from xelm.runs.provenance import provenance
from xelm.runs.run import Run
from xelm.runs.shares import expert_text
from xelm.training.metrics import HELD_OUT, METRICS, trained_tokens

CENTRE = "centre.npz"
"""Mean TF-IDF vector of an expert's documents, [D], by which TF-IDF routing finds it."""
CENTRE_DOCUMENTS = 2000
"""Largest number of documents of a language that a centre is the mean of: more hardly move it."""

_KEPT = (METRICS, HELD_OUT, CENTRE, RECIPE)
"""Files of a training that go with its checkpoint."""


def write_centre(run: Run, name: str, sources: Sequence[LanguageShare]) -> Path:
    """Writes the mean TF-IDF vector of a training's documents, [D], among its files, and returns
    the file; each language counts by its share."""
    vectoriser = run.vectoriser()
    total = sum(source.share for source in sources)
    centre = np.zeros(vectoriser.dimensions)
    for source in sources:
        numbers = np.arange(len(source.ids)) if source.documents is None else source.documents
        step = -(-len(numbers) // CENTRE_DOCUMENTS)
        documents = (source.ids.document(int(number)) for number in numbers[::step])
        centre += source.share / total * vectoriser.transform(documents).mean(axis=0)
    path = run.training(name) / CENTRE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, {"centre": centre.astype(np.float32)})
    return path


def write_model(
    run: Run,
    name: str,
    target: Path,
    model: ModelConfig,
    parameters: Mapping[str, Any],
    writes: bool,
    *,
    like: Path,
    base: Path | None = None,
) -> None:
    """Writes a trained model as the checkpoint `target`, rounded to the dtype of the seed's weights
    unless the configuration sets another, and deletes the training's own files. writes: whether
    this host writes. like: checkpoint with its configuration and tokenizer. base: checkpoint of
    which it has whole layers; what differs from it is stored alone, if that is less."""
    work, dtype = run.training(name), run.config.weights_dtype
    extra = [work / file for file in _KEPT if (work / file).exists()]
    whole = target if base is None else work / "whole"
    if writes and base is not None:
        shutil.rmtree(whole, ignore_errors=True)  # of a call that was interrupted
    write_checkpoint(
        whole,
        model,
        parameters,
        like=like,
        extra=extra,
        dtype=stored_dtype(run.seed) if dtype == "seed" else dtype,
        writes=writes,
    )
    if writes and base is not None:
        store(whole, base, target, extra=extra)
    if writes:
        shutil.rmtree(work, ignore_errors=True)


def write_expert_adapter(run: Run, job: Job, factors: Mapping[str, Any], writes: bool) -> None:
    """Writes the factors of a trained adapter as the directory `job.target`, as PEFT's files, and
    deletes the training's own files. writes: whether this host writes."""
    work = run.training(job.name)
    pairs = {
        path: (on_host(a, "float32"), on_host(b, "float32"))
        for path, (a, b) in factors_of(factors).items()
    }
    if not writes:
        return
    write_adapted(
        job.target,
        job.parent,
        Adapter(scale=job.config.lora.scale, factors=pairs),
        base_name=run.record.get("base_model") if job.parent == run.seed else None,
        extra=[work / file for file in _KEPT if (work / file).exists()],
    )
    shutil.rmtree(work, ignore_errors=True)


def publish(run: Run, expert: Expert, *, anyway: bool = False) -> Expert:
    """Publishes a trained expert, with the hashes of its files, if it passes the gate, and returns
    its new record: figures are measured on held-out text, a model card is added to its files, and
    the registry has both. UserError if it does not pass; anyway: publish it all the same."""
    directory, text = expert.directory(run.directory), expert_text(run, expert)
    if expert.made is None:
        data, tokens = provenance(expert_job(run, expert)), trained_tokens(directory)
    else:
        data, tokens = expert.data, expert.tokens
    evaluation = evaluate_held_out(run, expert, text.held_out)
    if not anyway:
        check_gate(run, expert, evaluation)
    readme = directory / README
    # Both are from a publication that was interrupted.
    readme.unlink(missing_ok=True)
    remove_unfinished(readme)
    files = hash_directory(directory)
    facts: dict[str, Any] = {"tokens": tokens, "evaluation": evaluation, "data": data}
    facts["stored"] = stored_as(directory)
    described = replace(expert, sha256=files, **facts)
    shown, masked = _facts(run, expert, text), not read_config(run.seed).causal
    page = card(described, run.registry(), shown, masked=masked)
    replace_file(readme, lambda file: file.write(page.encode()))
    files[README] = sha256(readme)
    # Before the registry, since `verify` compares every published expert with this record.
    manifest.record_expert(run.directory, replace(described, sha256=files))
    refusal = refusal_of(run, expert, evaluation)  # that was overridden
    registry = update(
        run.directory,
        lambda registry: registry.publish(expert.name, expert.version, sha256=files, **facts),
        "publish",
        {"refusal": refusal} if refusal else None,
    )
    run.failure(expert.name).unlink(missing_ok=True)
    return registry.expert(expert.name, expert.version)


def publish_anyway(run: Run, name: str) -> Expert:
    """Publishes the version of an expert that is trained, and that the gate kept back; where that
    is done already, nothing changes. UserError if there is none, or while another process trains
    it."""
    with locked(run.directory, f"train-{name}"):
        known = run.registry().versions(name)
        expert = run.registry().unfinished(name)
        done = known[-1].status == "published" or (known[-1].intermediate and known[-1].sha256)
        if expert is None and done:
            run.failure(name).unlink(missing_ok=True)
            return known[-1]
        if expert is None or not expert.directory(run.directory).exists():
            listed = ", ".join(f"v{e.version} ({e.status})" for e in known)
            raise UserError(
                f"{name} has no version that is trained and not published; it has {listed}"
            )
        return publish(run, expert, anyway=True)


def _facts(run: Run, expert: Expert, text: TrainingText) -> dict[str, str]:
    """Lines of the model card that the registry does not have."""
    made = without_folders(expert.made or {})
    facts = origin_facts(run) | made.get("licence", {})
    if made:
        shown = {key: made[key] for key in made if key not in ("licence", "sha256")}
        facts["made"] = ", ".join(f"{key} {value}" for key, value in shown.items())
    elif expert.cluster is not None and expert.version == 1:
        facts["share of the total tokens"] = f"{text.share:.4f}"
    elif expert.reason is not None:
        facts["parent chosen"] = expert.reason
    if expert.vocabulary is not None:
        facts["vocabulary"] = (
            f"{expert.vocabulary['pieces']:,} pieces more than the seed's, with rows by "
            f"{expert.vocabulary['initialise']}"
        )
    own = [f"{name}={value}" for name, value in (expert.settings or {}).items()]
    if settings := dict.fromkeys([*own, *run.settings]):
        facts["set for its training"] = " ".join(settings)
    return facts
