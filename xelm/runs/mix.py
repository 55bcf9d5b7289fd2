"""`xelm mix`: the experts of a RUN as one mixture of experts, a checkpoint of Mixtral's
architecture (Branch-Train-MiX: Sukhbaatar et al. 2024, arXiv 2403.07816), with a short training.

A mixture is a model for all languages, in RUN/mixes/NAME. It reads a text at the cost of a few
feed-forwards a layer, whatever the number of experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from clustering.errors import UserError
from experts.expert import Expert
from experts.manifest import MIXES, digest
from xelm.data.held_out import TrainingText
from xelm.data.rows import batches
from xelm.models.checkpoint import (
    load_parameters,
    read_config,
    read_hub_config,
    stored_dtype,
    write_checkpoint,
)
from xelm.models.config import ModelConfig
from xelm.models.families import hub_config
from xelm.models.mixture import (
    Moments,
    discriminants,
    mean_of,
    mixed,
    mixture_shape,
    with_feedforward,
)
from xelm.models.parameters import compiled_by_model, graph
from xelm.progress import bar
from xelm.runs import train
from xelm.runs.budget import Plan, announce, check_disk
from xelm.runs.check import check_models
from xelm.runs.combined import begin, check_model_name, join, making
from xelm.runs.ensembles import published
from xelm.runs.jobs import Job, dense_job
from xelm.runs.options import MixOptions
from xelm.runs.run import Run
from xelm.runs.shares import expert_text
from xelm.settings import to_json, vary
from xelm.training_config import MixtureConfig, TrainConfig

_FORMAT = 1
_SHORT = 0.05
"""Tokens of the training, as a share of those of all experts together."""
_RATE = 0.25
"""Peak learning rate, as a part of the dense baseline's: the experts' feed-forwards are trained
already. On the quickstart's RUN it was better than a half of that, and than the whole."""
_ROUTER_TOKENS = 2**15
"""Tokens of each expert's text from which the routers are computed."""
_RANDOM_SEED = 500
"""Distance of the random seed from that of the experts, who have read the same text in its
order."""
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Parameters(Sequence):
    """The parameters of checkpoints of one shape, each loaded when it is indexed."""

    def __init__(self, directories: Sequence[Path], model: ModelConfig):
        self._directories, self._model = directories, model

    def __len__(self) -> int:
        return len(self._directories)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return load_parameters(self._directories[index], self._model)


def mix(run: Run, name: str, options: MixOptions | None = None) -> Path:
    """Mixes all published experts into RUN/mixes/`name` and trains the mixture, or goes on where
    that was interrupted; returns its checkpoint.

    The training reads the text of the dense baseline in the same shares, with its settings but for
    the learning rate, and keeps the best of its measurements on held-out text. UserError for
    experts whose architecture Mixtral's cannot express, and for a mixture that exists, or began
    otherwise."""
    options, place = options or MixOptions(), f"{MIXES}/{name}"
    check_model_name(name, "mixture")
    with making(run, place):
        experts = published(run)
        job = _job(run, place, experts, options)
        if not job.target.exists():
            plan = _plan(run, job, experts, options)
            announce([plan])
            check_disk(run.directory, [plan])
            begin(run, place, _recipe(run, job, experts, options))
            _write_start(run, job, experts, options)
            for error in train.train_checkpoints(run, [job]).values():
                raise error
        join(run, place, job.text.sources, _introduction(experts, options), "mix")
    return job.target


def plan_mix(run: Run, name: str, options: MixOptions | None = None) -> Plan:
    """What `mix` would cost with these arguments; nothing is written."""
    options, place, experts = options or MixOptions(), f"{MIXES}/{name}", published(run)
    check_model_name(name, "mixture")
    plan = _plan(run, _job(run, place, experts, options), experts, options)
    check_disk(run.directory, [plan])
    return plan


def shape_of_mixture(run: Run, experts: Sequence[Expert], options: MixOptions) -> ModelConfig:
    """The shape of the mixture of some experts; UserError if it cannot be."""
    model, count = read_config(run.seed), len(experts)
    if count < 2:
        raise UserError(f"a mixture is made of two experts or more; {run.directory} has {count}")
    if model.expert_count:
        raise UserError(
            f"the experts of {run.directory} are mixtures of feed-forwards already, as their seed "
            "is; a mixture is made of models with one in each layer"
        )
    if options.top > count:
        raise UserError(f"top must be at most the {count} experts; got {options.top}")
    for expert in experts:
        found = read_config(expert.directory(run.directory))
        if (more := found.vocabulary_size - model.vocabulary_size) > 0:
            raise UserError(
                f"{expert.reference} has {more:,} more pieces than the seed, and a mixture reads "
                f"the seed's alone; to mix the other experts, retire it before: xelm retire "
                f"{run.directory} {expert.name}"
            )
        if found != model:
            raise UserError(f"{expert.reference} is of another shape than the seed")
    shape = mixture_shape(model, count, options.top)
    try:
        hub_config("mixtral", shape)
    except UserError as error:
        raise UserError(
            f"the experts of {run.directory} are of an architecture that Mixtral's cannot express "
            f"({error}); xelm merge and xelm distil make one model of them too"
        ) from None
    return shape


def _job(run: Run, place: str, experts: Sequence[Expert], options: MixOptions) -> Job:
    shape_of_mixture(run, experts, options)
    job = dense_job(run)
    tokens = options.tokens or max(1, round(_SHORT * job.config.tokens))
    usual = job.config.optimizer.learning_rate * _RATE
    config = replace(
        vary(job.config, {"optimizer.learning_rate": options.learning_rate or usual}),
        tokens=tokens,
        random_seed=job.config.random_seed + _RANDOM_SEED,
        mixture=MixtureConfig(trained=options.train, balance=options.balance),
    )
    return replace(
        job,
        name=place,
        parent=run.training(place) / "start",
        target=run.directory / place,
        config=config,
    )


def _plan(run: Run, job: Job, experts: Sequence[Expert], options: MixOptions) -> Plan:
    return train.plans_of_jobs(run, [job], model=shape_of_mixture(run, experts, options))[0]


def _recipe(run: Run, job: Job, experts: Sequence[Expert], options: MixOptions) -> dict[str, Any]:
    """Contents of recipe.json."""
    shape = shape_of_mixture(run, experts, options)
    return {
        "format": _FORMAT,
        "method": "mix",
        "made_of": [expert.reference for expert in experts],
        "records": {each.reference: digest(each, run.registry()) for each in experts},
        **asdict(options),
        "parameters": shape.parameter_count,
        "active_parameters": shape.active_parameter_count,
        "config": to_json(job.config),
    }


def _write_start(run: Run, job: Job, experts: Sequence[Expert], options: MixOptions) -> None:
    """Writes the mixture before its training, if it is not there."""
    if job.parent.exists():
        return
    check_models(run, experts)
    model, shape = read_config(run.seed), shape_of_mixture(run, experts, options)
    models = _Parameters([each.directory(run.directory) for each in experts], model)
    mean, moments = mean_of(models), []
    with bar(len(experts), "routers", "expert") as progress:
        for expert, parameters in zip(experts, models):
            alone = with_feedforward(mean, parameters)
            moments.append(_moments(run, model, alone, expert_text(run, expert), job.config))
            progress.update(1)
    known = read_hub_config(run.seed)
    special = {name: known[name] for name in _SPECIAL_IDS if known.get(name) is not None}
    write_checkpoint(
        job.parent,
        shape,
        mixed(mean, models, discriminants(moments)),
        model_type="mixtral",
        special_ids=special,
        tokenizer=run.seed,
        dtype=stored_dtype(run.seed),
    )


def _moments(
    run: Run,
    model: ModelConfig,
    parameters: Mapping[str, Any],
    text: TrainingText,
    config: TrainConfig,
) -> Moments:
    """What the routers see of an expert's text, where all of it is routed to that expert."""
    compiled = _observed(model, "float32")
    size = (model.layer_count, model.width)
    count, sums, products = 0, np.zeros(size), np.zeros((*size, model.width))
    some = replace(config, tokens=_ROUTER_TOKENS)
    for batch in batches(text.sources, some, run.tokenizer().text_format):
        read = [batch[name][:, :-1] for name in ("tokens", "positions", "segments")]
        first, second = compiled(parameters, *read)
        count += int((read[2] > 0).sum())
        sums, products = sums + np.asarray(first), products + np.asarray(second)
    return Moments(count, sums, products)


@compiled_by_model(graph)
def _observed(network, tokens, positions, segments):
    return network.feedforward_moments(tokens, positions, segments)


def _introduction(experts: Sequence[Expert], options: MixOptions) -> str:
    return (
        f"A mixture of {len(experts)} cross-lingual experts (X-ELM, [Blevins et al. 2024]"
        "(https://arxiv.org/abs/2401.10440)), made as in Branch-Train-MiX ([Sukhbaatar et al. 2024]"
        f"(https://arxiv.org/abs/2403.07816)): their feed-forwards, of which each token passes "
        f"{options.top} in each layer, and the mean of all their other weights. It is one model "
        "for all languages."
    )
