"""`xelm features --of updates`: how a few steps of training on each language alone move a seed."""

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays
from clustering.internal import Updates
from clustering.languages import canonical_all
from experts.lock import locked
from experts.verify import hash_directory
from xelm.data.held_out import divide
from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage
from xelm.models.checkpoint import load_parameters, read_config
from xelm.runs.run import Run
from xelm.settings import to_json, vary
from xelm.training.loop import train
from xelm.training.trainer import TrainingSpec
from xelm.training_config import TrainConfig

WEIGHTS = ("up", "gate", "down")
"""The feed-forward weights, whose movement the authors of Group then Scale compare."""
DRAWN = 1 << 18
"""Largest number of entries of each weight matrix that are compared: cosines are exact to about
.001, and a language takes three megabytes per layer instead of the size of the model."""


def updates(run: Run, languages: Sequence[str] | None = None, *, steps: int = 10) -> Updates:
    """Inner products of how `steps` steps of training on each language alone move the seed.

    Languages are of the RUN's corpus; None takes all. Each is trained as the dense baseline is, but
    without weight decay, on as many tokens, one after the other; a call that was interrupted goes
    on with the languages that are left. UserError for a language without text.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1; got {steps}")
    store = run.store()
    tags = tuple(store.tags(None if languages is None else canonical_all(languages)))
    dense, changes = run.config.dense, {"runtime.checkpoint_every": steps}
    # Decay would move the weights the same way for every language.
    changes |= {"tokens": steps * dense.tokens_per_step, "optimizer.weight_decay": 0.0}
    config = vary(dense, changes)
    made_from = {f"seed/{name}": found for name, found in hash_directory(run.seed).items()}
    made_from["corpus"] = str(store.record["corpus_sha256"])
    facts = json.dumps([to_json(config), made_from], sort_keys=True)
    work = run.training(f"updates-{hashlib.sha256(facts.encode()).hexdigest()[:8]}")
    with locked(run.directory, "updates"):
        for other in set(work.parent.glob("updates-*")) - {work}:  # of calls that were given up
            shutil.rmtree(other)
        moved = [_moved(run, store.languages[tag], config, work / tag) for tag in tags]
        shutil.rmtree(work)
    layers = (np.stack(layer).astype(np.float64) for layer in zip(*moved))
    values = np.stack([layer @ layer.T for layer in layers])
    return Updates(languages=tags, values=values, made_from=made_from)


def _moved(
    run: Run, ids: TokenizedLanguage, config: TrainConfig, work: Path
) -> Float[np.ndarray, "layers drawn"]:
    """Difference of new and old weights, read from a file if an earlier call has left it there."""
    kept = work / "moved.npz"
    if kept.exists():
        return read_arrays(kept)["moved"]
    model = read_config(run.seed)
    training = TrainingSpec(
        label=ids.language,
        start=functools.partial(load_parameters, run.seed, model),
        sources=divide([LanguageShare(ids=ids, share=1.0)], run.config.held_out).sources,
        config=config,
        directory=work,
    )
    trained = train(training, model, run.tokenizer().text_format)
    moved = _drawn(trained.parameters) - _drawn(load_parameters(run.seed, model))
    write_arrays(kept, {"moved": moved})
    shutil.rmtree(work / "checkpoints")
    return moved


def _drawn(parameters: Mapping[str, Any]) -> Float[np.ndarray, "layers drawn"]:
    """The same sample of entries of the feed-forward weights of every layer, each time."""
    draw, found = np.random.default_rng(0), []
    for block in (parameters["blocks"].get(name) for name in WEIGHTS):
        if block is not None:
            flat = block["weight"].reshape(len(block["weight"]), -1)
            size = flat.shape[1]
            found.append(flat if size <= DRAWN else flat[:, draw.integers(size, size=DRAWN)])
    return np.concatenate([np.asarray(part) for part in found], axis=1)
