"""`xelm report`: one self-contained HTML page about a RUN, and its figures as files.

Reads what lies in the RUN and computes every number and sentence; the page's look is
report.html.j2, its figures are `figures`. Opens no model, needs no JAX, and writes the same bytes
for the same RUN. What is not there is said, with the command that makes it.
"""

import json
import math
import os
import secrets
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clustering import figures as clustering_figures
from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.files import read_json
from clustering.languages import english_name
from experts.expert import SEED, Expert
from xelm.models.families import family
from xelm.runs import figures
from xelm.runs.figures import Curve, Picture, plural
from xelm.runs.run import Run
from xelm.training.metrics import read_metrics

FILE_NAME = "report.html"
TEMPLATE = "report.html.j2"

ROUTINGS = {
    "language": "is told the language of the text and asks the expert that serves it",
    "tfidf": "weighs the experts by the words so far",
    "uniform": "gives all experts the same weight",
    "posterior": "weighs the experts by how well they predicted the text so far",
}

System = tuple[str, str | None]
"""Name and routing, as in results.json."""

_SEED: System = (SEED, None)
_DENSE: System = ("dense", None)
_INK = "#222222"
_GREY = "#888888"
# Budgets are whole steps, so dense and experts never see exactly the same number of tokens.
_EQUAL_COMPUTE = 0.05
_MOST_POINTS = 400
_MOST_NAMES = 12


class Score(NamedTuple):
    """Of one system on one language, or its mean over several."""

    perplexity: float
    bits_per_byte: float


class Missing(NamedTuple):
    """What the page cannot show."""

    sentence: str
    command: str = ""
    """Makes it; empty where nothing does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Languages that stand together in every table and figure."""

    name: str
    colour: str
    languages: tuple[str, ...]
    note: str = ""
    """Why they stand apart from the clusters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What lies in a RUN."""

    run: Run
    experts: tuple[Expert, ...]
    """Published, or in training for the first time: in the order of the clusters, grown ones last.
    """
    retired: int
    """Versions out of use."""
    hashes: dict[str, str]
    """File of the seed -> SHA-256."""
    clusters: Clustering | None
    results: Mapping[str, Any]
    """results.json; empty before an evaluation."""
    scores: dict[System, dict[str, Score]]
    """System -> language -> score."""
    groups: tuple[Group, ...]
    """Every language once."""

    @property
    def published(self) -> list[Expert]:
        """The experts in use."""
        return [expert for expert in self.experts if expert.status == "published"]

    @property
    def branched_tokens(self) -> int:
        """That the experts of clusters were trained on, together."""
        return sum(expert.tokens for expert in self.published if expert.cluster is not None)

    @property
    def systems(self) -> list[System]:
        """Evaluated and no single expert: seed, dense, the ensembles."""
        return [s for s in (_SEED, _DENSE) if s in self.scores] + self.ensembles

    @property
    def ensembles(self) -> list[System]:
        """One for each routing."""
        return [system for system in self.scores if system[0] == "ensemble"]

    @property
    def name(self) -> str:
        """The RUN in a command, given from the folder that holds it."""
        return shlex.quote(self.run.directory.resolve().name)

    def colour(self, expert: Expert) -> str:
        """Of its cluster, or its own if it was grown."""
        name = expert.cluster or expert.name
        return next((group.colour for group in self.groups if group.name == name), _GREY)

    def tokens(self, system: Expert | str) -> int:
        """Of its training so far, those of its parent not counted."""
        metrics = self.metrics(system)
        return int(metrics[-1]["tokens"]) if metrics else 0

    def metrics(self, system: Expert | str) -> list[dict[str, Any]]:
        """Of "seed", "dense" or an expert, trained to the end or not."""
        name = system if isinstance(system, str) else system.name
        if isinstance(system, Expert):
            finished = system.directory(self.run.directory)
        else:
            finished = self.run.seed if name == SEED else self.run.dense
        found = read_metrics(finished / "metrics.jsonl")
        return found or read_metrics(self.run.training(name) / "metrics.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The best ensemble against a baseline, over the languages that every system has."""

    languages: tuple[str, ...]
    """Of the seed's corpus: on no others did dense and experts train alike."""
    means: dict[System, Score]
    """Arithmetic, as in the paper."""
    baseline: System
    """Dense, or the seed where there is no dense."""
    ensemble: System
    """Of the lowest mean perplexity."""
    ratios: tuple[float, ...]
    """Perplexity of the ensemble to that of the baseline, by language."""

    @property
    def change(self) -> float:
        """Of the mean perplexity in percent; below zero the ensemble is better."""
        after, before = self.means[self.ensemble], self.means[self.baseline]
        return 100 * (after.perplexity / before.perplexity - 1)

    @property
    def typical_change(self) -> float:
        """In percent, by the geometric mean of the ratios: every language weighs the same."""
        return 100 * math.expm1(sum(map(math.log, self.ratios)) / len(self.ratios))

    @property
    def better(self) -> int:
        """Languages in which the ensemble has the lower perplexity."""
        return sum(ratio < 1 for ratio in self.ratios)


def report(run: Run) -> Path:
    """Writes RUN/results/report.html and RUN/results/figures; returns the page's path."""
    import jinja2
    from markupsafe import Markup

    facts = read(run)
    comparison = compare(facts)
    shown: dict[str, Any] = {}
    for name, picture in pictures(facts).items():
        path = run.results / "figures" / name
        if isinstance(picture, Missing):
            shown[name] = {"missing": picture}
            for ending in ("svg", "png", "csv"):  # of a report before the RUN changed
                path.with_suffix(f".{ending}").unlink(missing_ok=True)
        else:
            made = figures.files(picture)
            for ending, content in made.items():
                _write(path.with_suffix(f".{ending}"), content)
            svg = Markup(figures.inline(made["svg"], name))
            shown[name] = {"picture": picture, "svg": svg}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "perplexity": perplexity,
        "signed": signed,
        "language": language_name,
        "named": named,
    }
    template = resources.files("xelm.runs").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=run.directory.resolve().name,
        facts=facts,
        sizes=sizes(facts),
        verdict=verdict(facts, comparison),
        missing=missing(facts),
        table=language_table(facts, comparison),
        routings=ROUTINGS,
        clusters=cluster_table(facts, comparison),
        experts=expert_table(facts),
        shown=shown,
        making=making(facts),
        hashes=hashes(facts),
        configuration=list(_flat(run.record.get("config", {}))),
    )
    path = run.results / FILE_NAME
    _write(path, page.encode())
    return path


def read(run: Run) -> Facts:
    """What there is; UserError for a file that is there but damaged."""
    registry = run.registry() if (run.directory / "registry.json").exists() else None
    clusters = run.clusters() if (run.directory / "clusters.json").exists() else None
    path = run.results / "results.json"
    results = read_json(path) if path.exists() else {}
    scores = _scores(results, path) if results else {}
    order = list(clusters.clusters if clusters else ())
    newest = {expert.name: expert for expert in registry.training()} if registry else {}
    newest |= {expert.name: expert for expert in registry.published()} if registry else {}
    experts = sorted(
        newest.values(),
        key=lambda e: (
            e.round,
            order.index(e.cluster) if e.cluster in order else len(order),
            e.name,
        ),
    )
    return Facts(
        run=run,
        experts=tuple(experts),
        retired=sum(e.status == "retired" for e in registry.experts) if registry else 0,
        hashes=registry.seed_sha256 if registry else {},
        clusters=clusters,
        results=results,
        scores=scores,
        groups=tuple(_groups(run, clusters, experts, scores)),
    )


def compare(facts: Facts) -> Comparison | None:
    """The best ensemble against dense, else against the seed; None if either is not evaluated."""
    baseline = next((system for system in (_DENSE, _SEED) if system in facts.scores), None)
    languages = tuple(
        tag
        for group in facts.groups
        for tag in group.languages
        if tag in facts.run.languages and all(tag in facts.scores[s] for s in facts.systems)
    )
    if baseline is None or not facts.ensembles or not languages:
        return None
    means = {s: _mean(facts.scores[s][tag] for tag in languages) for s in facts.systems}
    best = min(facts.ensembles, key=lambda system: means[system].perplexity)
    after, before = facts.scores[best], facts.scores[baseline]
    return Comparison(
        languages=languages,
        means=means,
        baseline=baseline,
        ensemble=best,
        ratios=tuple(after[tag].perplexity / before[tag].perplexity for tag in languages),
    )


def verdict(facts: Facts, comparison: Comparison | None) -> list[str]:
    """What came out, in sentences, the most important first."""
    if not facts.scores:
        return ["This RUN has not been evaluated yet, so nothing is known about its quality."]
    if not facts.ensembles:
        return ["Only single models have been evaluated: there is no ensemble yet."]
    if comparison is None:
        return ["No language of the seed's corpus was evaluated with every system."]
    count, means = len(comparison.languages), comparison.means
    known = {"the seed": _SEED, "dense training": _DENSE}
    before = ", ".join(
        f"{perplexity(means[system].perplexity)} for {name}"
        for name, system in known.items()
        if system in means
    )
    routing = f"routing by {comparison.ensemble[1]}"
    routing += ", which is told the language" if comparison.ensemble[1] == "language" else ""
    routing += f"; the best of {len(facts.ensembles)}" if len(facts.ensembles) > 1 else ""
    sentences = [
        _headline(comparison),
        f"The mean perplexity over {plural(count, 'language')} of the seed's corpus is {before}, "
        f"and {perplexity(means[comparison.ensemble].perplexity)} for the ensemble ({routing}).",
    ]
    if count > 1:
        sentences.append(
            f"The change is {signed(comparison.typical_change)} % when every language weighs the "
            "same (geometric mean of the ratios)."
        )
    return [*sentences, *_compute(facts, comparison), *_outside(facts, comparison)]


def missing(facts: Facts) -> list[Missing]:
    """Parts of a whole X-ELM that the RUN lacks."""
    found, run, experts = [], facts.name, facts.experts
    if facts.clusters is None:
        found.append(
            Missing(
                "The languages are in no clusters yet, so there are no experts.",
                f"xelm branch {run} --clusters DIR",
            )
        )
    waiting = [e for e in experts if e.status == "training"]
    branched = [e.name for e in waiting if e.cluster is not None]
    if branched:
        found.append(
            Missing(
                f"{plural(len(branched), 'expert')} not trained to the end: {_some(branched)}.",
                f"xelm train {run} --all",
            )
        )
    for expert in waiting:
        if expert.cluster is None:
            found.append(
                Missing(
                    f"The grown expert {expert.name} is not trained to the end.",
                    f"xelm grow {run} --language {shlex.quote(expert.name)} --corpus DIR",
                )
            )
    if not facts.run.dense.exists():
        found.append(
            Missing(
                "There is no dense baseline to compare with at equal compute.",
                f"xelm train {run} --dense",
            )
        )
    newer = [e.name for e in facts.published if (e.name, None) not in facts.scores]
    newer += ["dense"] if facts.run.dense.exists() and _DENSE not in facts.scores else []
    evaluate = f"xelm evaluate {run} --corpus DIR"
    if not facts.scores:
        found.append(Missing("There is no evaluation.", evaluate))
    elif newer:
        found.append(Missing(f"The evaluation is without {_some(newer)}.", evaluate))
    return found


def language_table(facts: Facts, comparison: Comparison | None) -> dict[str, Any] | None:
    """Scores by language and system, languages by group; None before an evaluation."""
    groups = []
    for group in facts.groups:
        rows = [
            {
                "tag": tag,
                "scores": [facts.scores[system].get(tag) for system in facts.systems],
                "change": _change(facts, comparison, [tag]),
            }
            for tag in group.languages
            if any(tag in facts.scores[system] for system in facts.systems)
        ]
        if rows:
            groups.append((group, rows))
    if not groups:
        return None
    return {
        "systems": [
            f"ensemble by {routing}" if routing else name for name, routing in facts.systems
        ],
        "groups": groups,
        "comparison": comparison,
        "means": comparison and [comparison.means[system] for system in facts.systems],
    }


def cluster_table(facts: Facts, comparison: Comparison | None) -> list[dict[str, Any]]:
    """Every cluster: languages, documents or distance within, change of the mean."""
    clusters, rows = facts.clusters, []
    if clusters is None:
        return []
    for group in facts.groups:
        if group.name not in clusters.clusters:
            continue
        members = clusters.clusters[group.name]
        compared = [tag for tag in group.languages if comparison and tag in comparison.languages]
        rows.append(
            {
                "group": group,
                "languages": members,
                "documents": clusters.documents and sum(clusters.documents[group.name].values()),
                "within": _distance_within(clusters, members),
                "change": _change(facts, comparison, compared),
            }
        )
    return rows


def expert_table(facts: Facts) -> list[dict[str, Any]]:
    """Every expert in use, or in training for the first time."""
    total = facts.branched_tokens
    rows = []
    for expert in facts.experts:
        published = expert.status == "published"
        tokens = expert.tokens if published else facts.tokens(expert)
        branched = published and expert.cluster is not None and total > 0
        share = f"{100 * tokens / total:.1f} %" if branched else "extra" if published else "–"
        rows.append(
            {
                "expert": expert,
                "colour": facts.colour(expert),
                "tokens": tokens,
                "share": share,
            }
        )
    return rows


def sizes(facts: Facts) -> list[tuple[str, str]]:
    """What the RUN is, as numbers and what they count."""
    run, clusters = facts.run, facts.clusters
    found = [(len(run.languages), "languages of the seed")]
    found += [(len(clusters.clusters), "clusters")] if clusters else []
    found += [(len(facts.published), "experts published")]
    rows = [(str(number), what) for number, what in found]
    if (run.seed / "config.json").exists():
        model = json.loads((run.seed / "config.json").read_text(encoding="utf-8"))
        shape = family(model["model_type"]).read(model)
        rows.append((figures.count(shape.parameter_count), "parameters in each model"))
        rows.append((f"{shape.vocabulary_size:,}", "pieces in the vocabulary"))
    grown = sum(expert.tokens for expert in facts.published if expert.cluster is None)
    trained = {
        "tokens for the seed": facts.tokens(SEED),
        "tokens for the experts of clusters": facts.branched_tokens,
        "tokens for dense": facts.tokens("dense"),
        "tokens more for grown experts": grown,
    }
    return rows + [(figures.count(tokens), what) for what, tokens in trained.items() if tokens]


def pictures(facts: Facts) -> dict[str, Picture | Missing]:
    """Name of the file -> figure, or why there is none."""
    clusters = facts.clusters
    nothing = Missing("")
    found: dict[str, Picture | Missing] = dict.fromkeys(
        ("tree", "distances", "composition"), nothing
    )
    if clusters is not None and clusters.of_documents:
        found["composition"] = figures.composition(clusters)
    elif clusters is not None:
        none = Missing(f"Clusters made by {clusters.method!r} have neither a tree nor distances.")
        found["tree"] = none if clusters.merges is None else figures.tree(clusters)
        found["distances"] = nothing if clusters.distances is None else figures.distances(clusters)
    seed = _curve(SEED, facts.metrics(SEED), _INK)
    found["loss-seed"] = (
        figures.losses([seed], "Training of the seed", "Smaller is better.")
        if seed
        else Missing("The training of the seed is not recorded here.")
    )
    end = "" if facts.run.dense.exists() else " (in training)"
    curves = [_curve(f"dense{end}", facts.metrics("dense"), _INK, dashed=True)]
    for expert in facts.experts:
        label = expert.name + ("" if expert.status == "published" else " (in training)")
        curves.append(_curve(label, facts.metrics(expert), facts.colour(expert)))
    curves = [curve for curve in curves if curve]
    found["loss-experts"] = (
        figures.losses(
            curves,
            "Training of the experts" + (" and of dense" if facts.metrics("dense") else ""),
            "Each starts from the seed, or from its parent if it was grown. They read different "
            "languages, so slopes can be compared, heights cannot.",
        )
        if curves
        else Missing("No expert has been trained yet.")
    )
    found["experts-by-language"] = _experts_by_language(facts)
    return found


def making(facts: Facts) -> list[tuple[str, str]]:
    """What was run on what, as recorded."""
    record, results = facts.run.record, facts.results
    origin = record.get("seed_from")
    rows = {
        "command": record.get("command"),
        "xelm": record.get("xelm"),
        "corpus": record.get("corpus"),
        "seed": "trained here" if origin is None else f"copied from {origin}",
    }
    if facts.clusters is not None:
        parameters = facts.clusters.parameters
        plain = {k: v for k, v in parameters.items() if not isinstance(v, dict | list)}
        rows["clusters"] = ", ".join([facts.clusters.method, *map(" ".join, _flat(plain))])
    if results:
        rows["evaluated on"] = results.get("corpus")
        rows["evaluated by xelm"] = results.get("xelm")
        rows["documents of each language"] = results.get("max_documents") or "all"
        rows["experts with weight at a token"] = results.get("top_m") or "all"
        rows["temperature of TF-IDF routing"] = results.get("temperature") or "default"
    return [(name, "–" if value is None else str(value)) for name, value in rows.items()]


def hashes(facts: Facts) -> list[tuple[str, str]]:
    """SHA-256 of what went in and of what came out."""
    rows = [("corpus", facts.run.record.get("corpus_sha256", "–"))]
    if facts.results:
        rows.append(("corpus of the evaluation", facts.results.get("corpus_sha256", "–")))
    made = {"seed": facts.hashes} | {expert.path: expert.sha256 for expert in facts.experts}
    return rows + [(f"{path}/{f}", sha) for path, files in made.items() for f, sha in files.items()]


def perplexity(value: float) -> str:
    """With as many digits as say something."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def signed(value: float) -> str:
    """One digit after the point, with a sign unless it is zero."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def language_name(tag: str) -> str:
    """English name and tag; the tag alone if it has no name."""
    try:
        name = english_name(tag)
    except ValueError:  # no BCP 47 tag
        return tag
    return tag if name == tag else f"{name} ({tag})"


def named(tags: Sequence[str], most: int | None = None) -> str:
    """Names of languages; of more than `most` the first, and how many there are besides."""
    return _some([language_name(tag) for tag in tags], most)


def _some(names: Sequence[str], most: int | None = _MOST_NAMES) -> str:
    shown = list(names[:most])
    return ", ".join(shown) + (
        f" and {len(names) - len(shown)} more" if names[most:] and most else ""
    )


def _headline(comparison: Comparison) -> str:
    count, better, change = len(comparison.languages), comparison.better, comparison.change
    other = "dense training" if comparison.baseline == _DENSE else "the seed"
    share = f"{'only ' if 2 * better < count else ''}{better}" if better else "none"
    wins = f"it is better in {share} of {plural(count, 'language')}"
    if signed(change) == "0.0":
        return f"The ensemble is as good as {other}: their mean perplexities are equal, and {wins}."
    size, word = ("better", "lower") if change < 0 else ("worse", "higher")
    agree = "and" if (2 * better > count) == (change < 0) else "but"
    return (
        f"The ensemble is {size} than {other}: its mean perplexity is {abs(change):.1f} % {word}, "
        f"{agree} {wins}."
    )


def _compute(facts: Facts, comparison: Comparison) -> Iterator[str]:
    """Whether the comparison is fair."""
    experts, dense = facts.branched_tokens, facts.tokens("dense")
    if comparison.baseline == _SEED:
        yield (
            "That is no fair comparison, since the experts were trained on more text than the "
            "seed: only a dense baseline at equal compute can tell whether experts pay."
        )
    elif experts and dense:
        equal = abs(dense / experts - 1) <= _EQUAL_COMPUTE
        yield (
            f"This {'is' if equal else 'is not'} at equal compute: dense was trained on {dense:,} "
            f"tokens, the experts of the clusters on {experts:,} together."
        )


def _outside(facts: Facts, comparison: Comparison) -> Iterator[str]:
    """What happened to the languages that are not in the means."""
    grown = [e for e in facts.published if e.cluster is None]
    if grown:
        tokens = sum(expert.tokens for expert in grown)
        yield (
            f"The ensemble also holds {plural(len(grown), 'grown expert')} "
            f"({_some([e.name for e in grown])}), trained on {tokens:,} tokens more."
        )
    tags = [tag for e in grown for tag in e.languages]
    changes = {tag: _change(facts, comparison, [tag], _SEED) for tag in tags}
    told = [
        f"{language_name(tag)} {signed(change)} %"
        for tag, change in changes.items()
        if change is not None
    ]
    if told:
        yield f"Perplexity of the grown languages, from the seed to the ensemble: {_some(told)}."
    outside = [
        tag
        for group in facts.groups
        for tag in group.languages
        if tag not in comparison.languages and any(tag in facts.scores[s] for s in facts.systems)
    ]
    if outside:
        yield (
            "Not in the mean, since not all systems were trained or scored on "
            f"{'it' if len(outside) == 1 else 'them'}: {named(outside, _MOST_NAMES)}."
        )


def _change(
    facts: Facts,
    comparison: Comparison | None,
    languages: Sequence[str],
    baseline: System | None = None,
) -> float | None:
    """Of the mean perplexity from the baseline to the best ensemble, in percent."""
    if comparison is None or not languages:
        return None
    before = facts.scores.get(baseline or comparison.baseline, {})
    after = facts.scores[comparison.ensemble]
    if any(tag not in before or tag not in after for tag in languages):
        return None
    means = [_mean(scores[tag] for tag in languages).perplexity for scores in (after, before)]
    return 100 * (means[0] / means[1] - 1)


def _mean(scores: Iterable[Score]) -> Score:
    return Score(*(float(value) for value in np.mean(list(scores), axis=0)))


def _scores(results: Mapping[str, Any], path: Path) -> dict[System, dict[str, Score]]:
    scores: dict[System, dict[str, Score]] = {}
    try:
        for row in results["rows"]:
            score = Score(float(row["perplexity"]), float(row["bits_per_byte"]))
            scores.setdefault((row["system"], row["routing"]), {})[row["language"]] = score
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run xelm evaluate again") from error
    return scores


def _groups(
    run: Run,
    clusters: Clustering | None,
    experts: Sequence[Expert],
    scores: Mapping[System, Mapping[str, Score]],
) -> Iterator[Group]:
    """Clusters, then what was grown, then what no expert was trained for."""
    grown = [expert for expert in experts if expert.cluster is None]
    names = [*(clusters.clusters if clusters else ()), *(expert.name for expert in grown)]
    colours = clustering_figures.cluster_colours(names)
    seen: set[str] = set()
    main = {tag: _main_cluster(clusters, tag) for tag in clusters.languages} if clusters else {}
    for name in clusters.clusters if clusters else ():
        mine = tuple(tag for tag in main if main[tag] == name)
        seen.update(mine)
        yield Group(name=name, colour=colours[name], languages=mine)
    for expert in grown:
        mine = tuple(tag for tag in expert.languages if tag not in seen)
        seen.update(mine)
        note = "grown later, not in the mean"
        yield Group(name=expert.name, colour=colours[expert.name], languages=mine, note=note)
    evaluated = dict.fromkeys(tag for found in scores.values() for tag in found)
    for name, tags, note in (
        ("in no cluster", run.languages, "no expert is trained for these" if clusters else ""),
        ("only evaluated", tuple(evaluated), "nothing was trained on these"),
    ):
        mine = tuple(tag for tag in tags if tag not in seen)
        seen.update(mine)
        if mine:
            yield Group(name=name, colour=_GREY, languages=mine, note=note)


def _main_cluster(clusters: Clustering, tag: str) -> str:
    """The cluster of a language; in clusters of documents, that with most of its documents."""
    names = [name for name, members in clusters.clusters.items() if tag in members]
    counts = clusters.documents
    return names[0] if counts is None else max(names, key=lambda name: counts[name][tag])


def _distance_within(clusters: Clustering, members: Sequence[str]) -> str | None:
    """Mean over the pairs of a cluster."""
    if clusters.distances is None:
        return None
    index = [clusters.languages.index(tag) for tag in members]
    pairs = [clusters.distances[i, j] for i in index for j in index if i < j]
    return f"{float(np.mean(pairs)):.2f}" if pairs else "–"


def _experts_by_language(facts: Facts) -> Picture | Missing:
    experts = [expert for expert in facts.experts if (expert.name, None) in facts.scores]
    seed = {tag: score.perplexity for tag, score in facts.scores.get(_SEED, {}).items()}
    if not experts or not seed:
        return Missing("No expert has been evaluated yet.")
    return figures.experts_by_language(
        {
            expert.name: {t: s.perplexity for t, s in facts.scores[expert.name, None].items()}
            for expert in experts
        },
        seed,
        {expert.name: facts.colour(expert) for expert in experts},
        {tag: group.colour for group in facts.groups for tag in group.languages if tag in seed},
        {expert.name: expert.languages for expert in experts},
    )


def _curve(
    label: str, metrics: Sequence[Mapping[str, Any]], colour: str, *, dashed: bool = False
) -> Curve | None:
    """Long trainings are averaged over equal stretches, so that the page stays small."""
    if not metrics:
        return None
    stretch = -(-len(metrics) // _MOST_POINTS)
    parts = [metrics[at : at + stretch] for at in range(0, len(metrics), stretch)]
    return Curve(
        label=label,
        tokens=[part[-1]["tokens"] for part in parts],
        losses=[sum(line["loss"] for line in part) / len(part) for part in parts],
        colour=colour,
        dashed=dashed,
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings under the names that `--set` takes."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value) if isinstance(value, str) else json.dumps(value)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
