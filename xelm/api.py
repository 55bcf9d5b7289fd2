"""What users of the library call: a RUN with everything that can be done with it as methods.

Each method does what the command of its name does; the modules of `xelm.runs` do the work. A
method imports what it needs when it is called.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clustering.clustering import Clustering
from clustering.errors import UserError
from xelm.evaluation.options import EvaluationOptions
from xelm.inference.routing import DEFAULT, Routing
from xelm.lifecycle import Lifecycle
from xelm.runs import run as runs
from xelm.runs.options import (
    AdoptOptions,
    AgainOptions,
    CompressOptions,
    DistilOptions,
    GrowOptions,
    InitOptions,
    LaunchOptions,
    MixOptions,
    PushOptions,
)

if TYPE_CHECKING:
    from clustering.internal import States, Updates
    from experts.expert import Expert
    from experts.merge_methods import MergeOptions
    from experts.registry import Registry
    from experts.verify import Fault
    from xelm.config import RunConfig
    from xelm.data.corpus import AnyCorpus
    from xelm.data.text_stats import TextStats
    from xelm.evaluation.results import Results
    from xelm.inference.ensemble import Ensemble
    from xelm.runs.adopt import Adoption
    from xelm.runs.budget import Plan
    from xelm.runs.export import GgufExport
    from xelm.runs.grow import Growth
    from xelm.runs.merge import Merged
    from xelm.runs.nearest import Relatives
    from xelm.runs.pull import Pulled
    from xelm.runs.push import Pushed
    from xelm.runs.status import Progress


class Run(Lifecycle):
    """One X-ELM on disk: paths and readers as in `xelm.runs.run.Run`, and the commands."""

    __slots__ = ()

    def branch(self, clusters: "Clustering | str | Path") -> "Registry":
        """Records one expert for each cluster, to be trained. clusters: a Clustering, or the
        directory that `xelm cluster` saved it in."""
        from xelm.runs.branch import branch

        loaded = clusters if isinstance(clusters, Clustering) else Clustering.load(clusters)
        return branch(self, loaded)

    def train(self, *names: str, dense: bool = False, options: LaunchOptions | None = None) -> None:
        """Trains and publishes experts, or goes on with trainings that were interrupted.

        names: experts; without any, and without `dense`, every expert of a cluster that is not
        trained yet. dense: train the dense baseline first, at the experts' total tokens. UserError
        names every training that failed.
        """
        from xelm.runs.fitted import fit_published
        from xelm.runs.launch import launch

        if not names and not dense:
            names = tuple(self.untrained())
        failures = launch(self, names, options, dense=dense)
        if failures:
            raise UserError("; ".join(dict.fromkeys(failures.values())))
        fit_published(self)

    def plan_training(self, *names: str, dense: bool = False) -> "list[Plan]":
        """What `train` would cost with these arguments; nothing is trained."""
        from xelm.runs.train import plans_of

        if not names and not dense:
            names = tuple(self.untrained())
        return plans_of(self, names, dense=dense)

    def train_again(
        self, name: str, corpus: "AnyCorpus | None" = None, options: AgainOptions | None = None
    ) -> "Expert":
        """Trains and publishes the next version of an expert, on more text; no other expert
        changes. Arguments as in `xelm.runs.again.train_again`."""
        from xelm.runs.again import train_again
        from xelm.runs.fitted import fit_published

        expert = train_again(self, name, corpus, options)
        fit_published(self)
        return expert

    def plan_again(
        self, name: str, corpus: "AnyCorpus | None" = None, options: AgainOptions | None = None
    ) -> "tuple[Expert, Plan, list[TextStats]]":
        """The version that `train_again` would make with these arguments, what its training would
        cost, and the text that it adds; nothing in the RUN changes."""
        from xelm.runs.again import plan_again

        return plan_again(self, name, corpus, options)

    def train_in_rounds(
        self, counts: Sequence[int], *, dense: bool = False, options: LaunchOptions | None = None
    ) -> None:
        """Trains all experts in rounds, or goes on with that: those of few clusters first, from
        which those of the next round start. counts: number of clusters of each round, such as
        (1, 4, 8). UserError names every training that failed."""
        from xelm.runs.fitted import fit_published
        from xelm.runs.rounds import train_rounds

        failures = train_rounds(self, counts, options, dense=dense)
        if failures:
            raise UserError("; ".join(dict.fromkeys(failures.values())))
        fit_published(self)

    def plan_rounds(self, counts: Sequence[int], *, dense: bool = False) -> "list[Plan]":
        """What `train_in_rounds` would cost with these arguments; nothing is trained."""
        from xelm.runs.rounds import plan_rounds

        return plan_rounds(self, counts, dense=dense)

    def grow(
        self,
        languages: str | Sequence[str] = (),
        corpus: "AnyCorpus | None" = None,
        options: GrowOptions | None = None,
    ) -> "list[Expert]":
        """Trains and publishes experts for new languages; no other expert changes. Arguments as in
        `xelm.runs.grow.grow`."""
        from xelm.runs.fitted import fit_published
        from xelm.runs.grow import grow

        experts = grow(self, languages, corpus, options)
        fit_published(self)
        return experts

    def plan_growth(
        self,
        languages: str | Sequence[str] = (),
        corpus: "AnyCorpus | None" = None,
        options: GrowOptions | None = None,
    ) -> "Growth":
        """The experts that `grow` would make with these arguments, what their training would cost,
        and their text; nothing in the RUN changes."""
        from xelm.runs.grow import plan_growth

        return plan_growth(self, languages, corpus, options)

    def adopt(
        self,
        checkpoint: str | Path,
        languages: Sequence[str] = (),
        corpus: "AnyCorpus | None" = None,
        options: AdoptOptions | None = None,
    ) -> "Expert":
        """Makes an expert, or the next version of one, of a checkpoint that was trained elsewhere;
        no other expert changes. Arguments as in `xelm.runs.adopt.adopt`."""
        from xelm.runs.adopt import adopt
        from xelm.runs.fitted import fit_published

        expert = adopt(self, checkpoint, languages, corpus, options)
        fit_published(self)
        return expert

    def plan_adoption(
        self,
        checkpoint: str | Path,
        languages: Sequence[str] = (),
        corpus: "AnyCorpus | None" = None,
        options: AdoptOptions | None = None,
    ) -> "Adoption":
        """What `adopt` would make with these arguments, and what was checked; nothing in the RUN
        changes."""
        from xelm.runs.adopt import plan_adoption

        return plan_adoption(self, checkpoint, languages, corpus, options)

    def compress(self, name: str, options: CompressOptions) -> "Expert":
        """Makes the next version of an expert, of which less is stored; no other expert changes.
        Arguments as in `xelm.runs.compress.compress`."""
        from xelm.runs.compress import compress

        return compress(self, name, options)

    def evaluate(
        self,
        corpus: "AnyCorpus",
        options: EvaluationOptions | None = None,
        *,
        languages: Sequence[str] | None = None,
    ) -> "Results":
        """Perplexity and bits per byte by language, of every model and of the ensemble under each
        routing, also in RUN/results/results.json. languages: of the corpus; None: all."""
        from xelm.runs.evaluate import evaluate

        return evaluate(self, corpus, options, languages=languages)

    def ensemble(
        self, routing: str | Routing = DEFAULT, top_m: int | None = None, *, dtype: str = "auto"
    ) -> "Ensemble":
        """The published experts with a router, which score, continue and fill text.

        routing: name of a router, or a `Routing` with its options. top_m: largest number of experts
        that are run at each token; None: as `routing` says. dtype: of the weights in memory,
        float32, bfloat16 or int8; "auto" is that of the experts' weights on accelerators, and
        float32 on CPUs.
        """
        from xelm.runs.ensembles import open_ensemble

        chosen = Routing(name=routing) if isinstance(routing, str) else routing
        if top_m is not None:
            chosen = replace(chosen, top_m=top_m)
        return open_ensemble(self, chosen, dtype=dtype)

    def model(self, name: str, *, dtype: str = "auto") -> "Ensemble":
        """One model of the RUN, which scores, continues and fills text alone. name: as in `export`.
        dtype: as in `ensemble`."""
        from xelm.runs.ensembles import open_model

        return open_model(self, name, dtype=dtype)

    def report(self) -> Path:
        """Writes one self-contained HTML page about the RUN, and its figures; returns its path."""
        from xelm.runs.report import report

        return report(self)

    def status(self) -> "list[Progress]":
        """How far each training is."""
        from xelm.runs.status import progress

        return progress(self)

    def cluster_documents(
        self, k: int, languages: Sequence[str] | None = None, *, random_seed: int = 0
    ) -> Clustering:
        """k clusters of the documents of the RUN's corpus by TF-IDF, to branch on. languages: those
        of the documents; None: all. `clustering` clusters languages."""
        from xelm.runs.cluster import documents_of_run

        return documents_of_run(self, k, languages, random_seed=random_seed)

    def nearest(
        self,
        language: str,
        by: Sequence[str] = ("mixture",),
        languages: Sequence[str] | None = None,
    ) -> "list[Relatives]":
        """Relatives of a language among those that the experts serve, nearest first by the first of
        these measures. languages: others to compare with."""
        from xelm.runs.distances import Sources
        from xelm.runs.nearest import relatives

        return relatives(language, by, Sources(run=self), languages)

    def features(
        self,
        corpus: "AnyCorpus | None" = None,
        languages: Sequence[str] | None = None,
        *,
        documents: int = 100,
    ) -> "States":
        """States of the seed as it reads the first documents of each language, for
        `clustering.internal`. corpus: None takes the RUN's."""
        from xelm.runs.features import features

        return features(self, corpus, languages, documents=documents)

    def updates(self, languages: Sequence[str] | None = None, *, steps: int = 10) -> "Updates":
        """How a few steps of training on each language alone move the seed, for
        `clustering.internal`."""
        from xelm.runs.updates import updates

        return updates(self, languages, steps=steps)

    def verify(self) -> "list[Fault]":
        """Every file that inference reads and that is not as it was written; empty if all are."""
        from experts.verify import verify

        return verify(self.directory)

    def export(self, name: str, out: str | Path) -> Path:
        """Copies the checkpoint of a model into the new directory `out`, and returns `out`. name:
        an expert, NAME@vN for a certain version of it, "seed", "dense", or the name of a model that
        is made of several, such as "merges/NAME"."""
        from xelm.runs.export import export

        return export(self, name, out)

    def export_adapter(self, name: str, out: str | Path) -> Path:
        """Writes an expert that was trained as an adapter into the new directory `out`, in PEFT's
        files, and returns the checkpoint that it is an adapter of. name: an expert, or NAME@vN."""
        from xelm.runs.export import export_adapter

        return export_adapter(self, name, out)

    def export_gguf(
        self, name: str, out: str | Path, converter: str | Path | None = None
    ) -> "GgufExport":
        """Writes a model as a GGUF file for llama.cpp, if that reads it as xelm reads the model.
        Arguments as in `xelm.runs.export.export_gguf`."""
        from xelm.runs.export import export_gguf

        return export_gguf(self, name, out, converter)

    def distil(
        self,
        name: str = "student",
        options: DistilOptions | None = None,
        routing: Routing | None = None,
    ) -> Path:
        """Trains one model for all languages, RUN/students/`name`, to predict what the ensemble
        predicts, or goes on with one that was interrupted. Arguments as in
        `xelm.runs.distil.distil`."""
        from xelm.runs.distil import distil

        return distil(self, name, options, routing)

    def plan_distil(
        self,
        name: str = "student",
        options: DistilOptions | None = None,
        routing: Routing | None = None,
    ) -> "Plan":
        """What `distil` would cost with these arguments; nothing is written."""
        from xelm.runs.distil import plan_distil

        return plan_distil(self, name, options, routing)

    def mix(self, name: str, options: MixOptions | None = None) -> Path:
        """Mixes all published experts into one mixture of experts, RUN/mixes/`name`, and trains it,
        or goes on with one that was interrupted. Arguments as in `xelm.runs.mix.mix`."""
        from xelm.runs.mix import mix

        return mix(self, name, options)

    def plan_mix(self, name: str, options: MixOptions | None = None) -> "Plan":
        """What `mix` would cost with these arguments; nothing is written."""
        from xelm.runs.mix import plan_mix

        return plan_mix(self, name, options)

    def merge(
        self,
        *names: str,
        options: "MergeOptions | None" = None,
        weights: "str | Sequence[float]" = "equal",
        base: str | None = None,
        name: str | None = None,
        out: str | Path | None = None,
    ) -> "Merged":
        """Merges models, by default all published experts, into one Hugging Face checkpoint: into
        RUN/merges/`name`, where `evaluate` measures it too, or into the directory `out`. Arguments
        as in `xelm.runs.merge.merge`."""
        from xelm.runs.merge import merge

        return merge(self, names, options, weights=weights, base=base, name=name, out=out)

    def push(
        self, to: str, name: str | None = None, options: PushOptions | None = None
    ) -> "Pushed":
        """Writes an expert, or (None) the whole RUN without its text, into the repository `to`,
        OWNER/REPO, of the Hugging Face Hub. Arguments as in `xelm.runs.push.push`."""
        from xelm.runs.push import push

        return push(self, to, name, options)

    def plan_push(
        self, to: str, name: str | None = None, options: PushOptions | None = None
    ) -> "Pushed":
        """The files that `push` would write with these arguments; reaches no host."""
        from xelm.runs.push import plan_push

        return plan_push(self, to, name, options)

    def pull(
        self, name: str, corpus: "AnyCorpus | None" = None, revision: str | None = None
    ) -> "Expert":
        """Makes an expert of the RUN from the repository `name`, OWNER/REPO, of the Hugging Face
        Hub; no other expert changes. Arguments as in `xelm.runs.pull.pull_into`. (`xelm.pull`
        downloads a whole RUN.)"""
        from xelm.runs.fitted import fit_published
        from xelm.runs.pull import pull_into

        expert = pull_into(self, name, corpus, revision)
        fit_published(self)
        return expert


def open_run(directory: str | Path, *, settings: Sequence[str] = ()) -> Run:
    """The RUN in a directory; UserError if there is none, or an unfinished one. settings: such as
    "experts.runtime.dtype=bfloat16", for this object in place of what run.json says."""
    return _with_methods(runs.open_run(directory, settings=settings))


def init(
    directory: str | Path,
    corpus: "AnyCorpus",
    config: "RunConfig",
    options: InitOptions | None = None,
    *,
    clusters: Clustering | None = None,
) -> Run:
    """Makes a RUN, or goes on with one that was interrupted: tokenizer, tokenised corpus and seed.
    Arguments as in `xelm.runs.init.init`."""
    from xelm.runs.init import init as make

    return _with_methods(make(directory, corpus, config, options, clusters=clusters))


def pull(name: str, directory: str | Path, revision: str | None = None) -> "Pulled":
    """Downloads a RUN that was pushed to the Hugging Face Hub as OWNER/REPO into a new directory.
    Arguments as in `xelm.runs.pull.pull`."""
    from xelm.runs.pull import pull as download

    return download(name, directory, revision)


def quickstart(directory: str | Path = "xelm-quickstart") -> Run:
    """The whole path on the embedded sample, on a CPU, in minutes, with results and a report."""
    from xelm.quickstart import quickstart as make

    run, _, _ = make(directory)
    return _with_methods(run)


def _with_methods(run: runs.Run) -> Run:
    return Run(directory=run.directory, record=run.record, settings=run.settings)
