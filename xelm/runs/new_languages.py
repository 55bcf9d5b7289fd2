"""Which languages are grown, and which of them share an expert: by name, or by family."""

import math
from collections.abc import Sequence
from statistics import fmean

from clustering.errors import UserError
from clustering.genealogy import of_family
from clustering.languages import canonical_all, english_name
from clustering.names import name_clusters
from experts.grow import begun_with, is_grown, refuse_served
from experts.registry import Registry
from xelm.data.contents import languages_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.runs.cluster import by_measure
from xelm.runs.distances import Sources
from xelm.runs.nearest import DEFAULT
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run


def languages_to_grow(
    run: Run, languages: Sequence[str], corpus: AnyCorpus | None, family: str | None
) -> tuple[str, ...]:
    """Canonical tags of the languages that a growth is for: those named, or those of a family in
    the corpus (None: that of the RUN) that no expert serves; where a growth of such languages has
    begun, its languages. UserError for both or neither, an unknown family, and if there are none.
    """
    if bool(languages) == (family is not None):
        came = "both" if languages else "neither"
        raise UserError(
            f"name the languages to grow (--language), or their family (--family); got {came}"
        )
    if family is None:
        return canonical_all(languages)
    text: AnyCorpus = run.record["corpus"] if corpus is None else corpus
    registry = run.registry()
    members = of_family(family, languages_of(text))
    if not members:
        raise UserError(f"{Corpus.of(text)} has no text in a {family} language")
    for expert in registry.training():
        group = begun_with(registry, expert)
        tags = tuple(tag for one in group for tag in one.languages)
        if is_grown(expert) and set(tags) <= set(members):
            return tags
    in_use = [each for each in registry.experts if each.status != "retired"]
    served = {tag: expert for expert in in_use for tag in expert.languages}
    if found := tuple(tag for tag in members if tag not in served):
        return found
    shown = ", ".join(f"{english_name(tag)} by {served[tag].name}" for tag in members)
    raise UserError(f"all {family} languages of {Corpus.of(text)} are served: {shown}")


def groups_of(
    run: Run, tags: Sequence[str], corpus: AnyCorpus | None, options: GrowOptions
) -> dict[str, tuple[str, ...]]:
    """Name of each new expert, and its languages: clusters by the measure of `options`, and by the
    rule that made the clusters of the RUN. UserError for a language that is served already, or of
    which the measure knows too little, and for more clusters than languages."""
    for tag in tags:
        refuse_served(run.registry(), tag)
    count = options.clusters or default_clusters(run.registry(), len(tags))
    if count > len(tags):
        raise UserError(f"{len(tags)} languages cannot form {count} clusters")
    if count == len(tags) or count == 1:
        return name_clusters([[tag] for tag in tags] if count > 1 else [tags])
    branched = (run.directory / "clusters.json").exists()  # its experts may all be adopted
    rule = (run.clusters().parameters.get("rule") if branched else None) or "pairs"
    measure, sources = options.by or DEFAULT, Sources(run=run, corpus=corpus)
    found = by_measure(measure, count, sources, languages=tags, rule=rule)
    if found.unassigned:
        raise UserError(
            f"{measure} knows too little of {', '.join(found.unassigned)} to cluster them; grow "
            "them apart, or choose another measure with --by"
        )
    return found.clusters


def default_clusters(registry: Registry, languages: int) -> int:
    """Number of new experts for so many languages: the fewest that serve no more languages on
    average than the experts of clusters of the RUN."""
    sizes = [len(each.languages) for each in registry.published() if each.cluster is not None]
    return math.ceil(languages / max(1, fmean(sizes or [1])))
