"""Facts of a RUN that the report shows: experts, clusters, scores and metrics."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clustering.clustering import Clustering
from clustering.figures import cluster_colours
from experts.expert import Expert
from experts.registry import Registry
from xelm.data.text_stats import TextStats
from xelm.evaluation.results import DENSE, SEED, Summary, System
from xelm.inference.routing import DEFAULT
from xelm.models.config import ModelConfig

_GREY = "#888888"


class Score(NamedTuple):
    """Score of one system on one language, or its mean over several."""

    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Languages that stand together in every table and figure."""

    name: str
    colour: str
    languages: tuple[str, ...]
    note: str
    """Why these languages are in no cluster; empty for a cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that the report shows."""

    name: str
    """Name of the RUN's directory."""
    languages: Sequence[str]
    """Languages of the RUN's corpus."""
    record: Mapping[str, Any]
    """run.json."""
    registry: Registry
    """The registry; empty if there is none."""
    experts: list[Expert]
    """Experts in use or in their first training, in the order of clusters; grown ones last."""
    has_dense: bool
    """Whether dense was trained to the end."""
    model: ModelConfig | None
    """Shape of the seed and of all other models."""
    clusters: Clustering | None
    results: Mapping[str, Any]
    """results.json; empty before an evaluation."""
    scores: Mapping[System, Mapping[str, Score]]
    """System -> language -> score."""
    summaries: Sequence[Summary]
    """Summary of every system; none before an evaluation."""
    texts: Mapping[str, TextStats]
    """Statistics of the evaluated text, by language; none before an evaluation."""
    metrics: Mapping[System, list[dict[str, Any]]]
    """Seed, dense or expert -> lines of its metrics.jsonl, finished or not; may be empty."""
    held_out: Mapping[System, list[dict[str, Any]]]
    """The same of its held_out.jsonl."""
    groups: list[Group]
    """Groups of languages; every language is in one."""

    @property
    def masked(self) -> bool:
        """Whether the models are encoders, which predict masked tokens."""
        return self.model is not None and not self.model.causal

    @property
    def published(self) -> list[Expert]:
        """The experts in use."""
        return [expert for expert in self.experts if expert.status == "published"]

    @property
    def grown(self) -> list[Expert]:
        """The experts in use that were not branched for a cluster."""
        return [expert for expert in self.published if expert.cluster is None]

    @property
    def branched_tokens(self) -> int:
        """Number of tokens that the experts of clusters were trained on together, in all rounds."""
        trained = [expert for expert in self.published if expert.cluster is not None]
        trained += [expert for expert in self.registry.experts if expert.intermediate]
        return sum(expert.tokens for expert in trained)

    @property
    def ensembles(self) -> list[System]:
        """The ensemble under each routing, the default first."""
        found = [system for system in self.scores if system.name == "ensemble"]
        return sorted(found, key=lambda system: system.routing != DEFAULT)

    @property
    def systems(self) -> list[System]:
        """Evaluated systems that are not single experts: seed, dense, merged models and other
        combined ones, ensembles."""
        combined = sorted(system for system in self.scores if system.is_combined)
        general = [system for system in (SEED, DENSE, *combined) if system in self.scores]
        return general + self.ensembles

    @property
    def evaluated(self) -> list[str]:
        """Languages on which any of `systems` was scored, in the order of the groups."""
        scored = {tag for system in self.systems for tag in self.scores[system]}
        return [tag for group in self.groups for tag in group.languages if tag in scored]

    def marked(self, mark: str) -> list[str]:
        """Evaluated languages whose figures have this mark."""
        return [t for t in self.evaluated if t in self.texts and mark in self.texts[t].marks]

    def colour(self, expert: Expert) -> str:
        """Colour of the expert's cluster, or its own if it was grown."""
        name = expert.cluster or expert.name
        return next((group.colour for group in self.groups if group.name == name), _GREY)

    def tokens(self, system: System) -> int:
        """Number of tokens of a system's training so far, without those of its parent."""
        metrics = self.metrics[system]
        return int(metrics[-1]["tokens"]) if metrics else 0


def grouped(
    corpus_languages: Sequence[str],
    clusters: Clustering | None,
    experts: Sequence[Expert],
    scores: Mapping[System, Mapping[str, Score]],
) -> Iterator[Group]:
    """Groups of languages: the clusters, the grown languages, and those without an expert."""
    members: dict[str, list[str]] = {}
    if clusters:
        main = {tag: clusters.cluster_of(tag) for tag in clusters.languages}
        members = {name: [t for t in main if main[t] == name] for name in clusters.clusters}
    grown = {expert.name: expert.languages for expert in experts if expert.cluster is None}
    evaluated = [tag for found in scores.values() for tag in found]
    colours = cluster_colours([*members, *grown])
    seen: set[str] = set()
    for name, tags, note in (
        *((name, tags, "") for name, tags in members.items()),
        *((name, tags, "grown later, not in the mean") for name, tags in grown.items()),
        ("in no cluster", corpus_languages, "no expert is trained for these" if clusters else ""),
        ("only evaluated", evaluated, "nothing was trained on these here"),
    ):
        mine = tuple(dict.fromkeys(tag for tag in tags if tag not in seen))
        seen.update(mine)
        if mine or name in colours:
            yield Group(name=name, colour=colours.get(name, _GREY), languages=mine, note=note)
