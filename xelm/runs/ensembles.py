"""Opens the ensemble of a RUN: its published experts with a router over them."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from experts.expert import Expert
from xelm.data.vocabulary import Vocabulary
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import Loader, Overlay, ParameterCache
from xelm.inference.routers import only
from xelm.inference.routing import Routing
from xelm.inference.sampling import read_sampling_params
from xelm.inference.vocabularies import InPieces, joined, rows_for, same
from xelm.models.checkpoint import (
    inference_dtype,
    read_config,
    read_embedding,
    read_for_inference,
)
from xelm.models.config import ModelConfig
from xelm.models.parameters import NEW_ROWS
from xelm.models.shared import read_part
from xelm.models.stored import chain, own_weight_files, root
from xelm.models.vocabulary_rows import resized
from xelm.runs.check import check_models, is_mixture
from xelm.runs.make_router import general_models, make_router, models_behind
from xelm.runs.named import find_model
from xelm.runs.run import Run
from xelm.runs.vocabulary import vocabulary_of


def open_ensemble(
    run: Run,
    routing: Routing,
    *,
    experts: Sequence[Expert] | None = None,
    every_model: bool = False,
    dtype: str = "auto",
    before: Ensemble | None = None,
) -> Ensemble:
    """The ensemble of the experts and of the models that the router weighs behind them; each is
    loaded when it is first read.

    experts: None: those that are published now. every_model: whether the seed, the dense baseline
    and merged models are among the models in any case. dtype: of the weights in memory; see
    `common_dtype`. before: an ensemble of the same RUN, whose dtype and loaded parameters are used
    again. UserError if the files of a model are not those that were published.
    """
    experts = published(run) if experts is None else experts
    check_top_m(routing.top_m, len(experts))
    others = models_behind(run, routing)
    if every_model:
        # Mixtures of experts have another shape, and are run alone.
        of_one_shape = {n: path for n, path in run.combined().items() if not is_mixture(n)}
        others |= general_models(run) | of_one_shape
    check_models(run, experts, others)
    paths = {expert.name: expert.directory(run.directory) for expert in experts} | others
    model = read_config(run.seed)
    models = _Models(
        paths=list(paths.values()),
        vocabularies=[vocabulary_of(run, path) for path in paths.values()],
        model=model,
        dtype=before.dtype if before else common_dtype(paths.values(), dtype),
    )
    parameters = models.parameters(None, before.parameters if before else None)
    ensemble = Ensemble(
        names=list(paths),
        model=model,
        parameters=parameters,
        dtype=models.dtype,
        router=make_router(run, experts, routing),
        tokenizer=run.tokenizer(),
        # Experts that were given a weight by hand are read, however small it is.
        limits=replace(routing, least_weight=0.0) if routing.name == "fixed" else routing,
        context_length=run.context_length(),
        sampling=read_sampling_params(run.seed)[0],
    )
    vocabularies = {one.key: one for one in models.vocabularies if one is not None}
    further = [
        _in_vocabulary(ensemble, models, one, given=routing.name == "fixed")
        for one in vocabularies.values()
    ]
    return joined(ensemble, further)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Models:
    """The checkpoints of an ensemble, and how they are loaded for text in a vocabulary."""

    paths: Sequence[Path]
    vocabularies: Sequence[Vocabulary | None]
    """That of each model; None is the seed's."""
    model: ModelConfig
    """Shape of the seed."""
    dtype: str

    def parameters(self, vocabulary: Vocabulary | None, cache: Any) -> ParameterCache:
        """Parameters of all models for a vocabulary, in the memory of another cache, if any."""
        loaders, places = [], []
        for path, own in zip(self.paths, self.vocabularies):
            name, load = place_of(path), _sharing(path, self.dtype)
            if not same(own, vocabulary):
                # All but a few rows is shared with the model as it reads its own vocabulary.
                load = Overlay(base_name=name, base=load, part=self._rows(path, vocabulary))
                name = f"{name} in {vocabulary and vocabulary.key}"
            loaders.append(load)
            places.append(name)
        if cache is None:
            return ParameterCache(loaders, names=places)
        assert isinstance(cache, ParameterCache)
        return cache.with_experts(loaders, places)

    def _rows(self, path: Path, vocabulary: Vocabulary | None) -> Callable[[], Any]:
        """A function that returns what a model has beside its own parameters in a pool with another
        vocabulary."""

        def load() -> dict[str, Any]:
            rows = rows_for(vocabulary, self.model, read_embedding(path, self.dtype))
            return {NEW_ROWS: rows}

        return load


def _in_vocabulary(
    ensemble: Ensemble, models: _Models, vocabulary: Vocabulary, *, given: bool
) -> Ensemble:
    """An ensemble of the same models for text in a vocabulary of some of them. given: whether
    weights were given by hand."""
    keys = [one and one.key for one in models.vocabularies]
    owners = [number for number, key in enumerate(keys) if key == vocabulary.key]
    router = InPieces(router=ensemble.router, vocabulary=vocabulary, owners=owners, given=given)
    return replace(
        ensemble,
        model=resized(models.model, vocabulary.size),
        parameters=models.parameters(vocabulary, ensemble.parameters),
        router=router,
        tokenizer=vocabulary.tokenizer,
        vocabulary=vocabulary,
        owners=owners,
    )


def place_of(path: Path) -> str:
    """Name of a checkpoint in a cache of parameters: its path, the same for each way to write it,
    with size, time of change and inode of the files that its weights are composed of. Another model
    may come to lie there, as when an expert is removed and its language grown again."""
    files = [folder / name for folder in chain(path) for name in own_weight_files(folder)]
    there = [file.stat() if file.is_file() else None for file in files]
    stamps = [found and (found.st_size, found.st_mtime_ns, found.st_ino) for found in there]
    return f"{os.path.normpath(path.absolute())} {stamps}"


def _sharing(path: Path, dtype: str) -> Loader:
    """How the parameters of a model are loaded: of one that stores a difference, beside the
    complete checkpoint that it shares arrays with."""
    base, shape = root(path), read_config(path)
    if base == path:
        return partial(read_for_inference, path, shape, dtype)
    return Overlay(
        base_name=place_of(base),
        base=partial(read_for_inference, base, shape, dtype),
        part=partial(read_part, path, shape, dtype),
    )


def open_model(
    run: Run, name: str, *, dtype: str = "auto", cache: ParameterCache | None = None
) -> Ensemble:
    """One model of a RUN as an ensemble of itself alone; its shape may be another than that of the
    experts. name: as in `find_model`. dtype: as in `open_ensemble`. cache: in whose memory the
    parameters lie; None: one of its own."""
    path = find_model(run, name).directory
    model, dtype = read_config(path), inference_dtype(path, dtype)
    vocabulary = vocabulary_of(run, path)
    loaders, places = [partial(read_for_inference, path, model, dtype)], [place_of(path)]
    return Ensemble(
        names=[name],
        model=model,
        parameters=cache.with_experts(loaders, places) if cache else ParameterCache(loaders),
        dtype=dtype,
        router=only(0, 1, "fixed"),
        tokenizer=vocabulary.tokenizer if vocabulary else run.tokenizer(),
        context_length=run.context_length(),
        sampling=read_sampling_params(run.seed)[0],
    )


def common_dtype(checkpoints: Iterable[Path], dtype: str) -> str:
    """The dtype in which checkpoints are run together: `inference_dtype` of all of them, or float32
    where they differ."""
    found = {inference_dtype(checkpoint, dtype) for checkpoint in checkpoints}
    return found.pop() if len(found) == 1 else "float32"


def published(run: Run) -> tuple[Expert, ...]:
    """The published experts; UserError if there is none."""
    experts = run.registry().published()
    if not experts:
        raise UserError(
            f"{run.directory} has no published expert yet; run: xelm train {run.directory} --all"
        )
    return experts


def check_top_m(top_m: int | None, experts: int) -> None:
    """Raises UserError unless `top_m` is None or between 1 and the number of experts."""
    if top_m is not None and not 1 <= top_m <= experts:
        raise UserError(f"top_m must be between 1 and {experts} experts; got {top_m}")
