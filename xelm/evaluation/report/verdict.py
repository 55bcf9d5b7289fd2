"""The ensemble as users run it, compared with a baseline: numbers and sentences."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xelm.evaluation.report.facts import Facts, Score
from xelm.evaluation.report.words import language_name, listed, named, perplexity, plural, signed
from xelm.evaluation.results import DENSE, SEED, System
from xelm.inference.routing import DEFAULT

# Budgets are whole steps, so dense and experts never see exactly the same number of tokens.
_EQUAL_COMPUTE = 0.05
_NAMES = {SEED: "the seed", DENSE: "dense training"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Comparison of the ensemble with a baseline over the languages that every system has."""

    scores: Mapping[System, Mapping[str, Score]]
    """System -> language -> score."""
    languages: Sequence[str]
    """Languages of the RUN's corpus, the only ones on which dense and experts trained equally."""
    means: dict[System, Score]
    """Arithmetic means over the languages, as in the paper."""
    baseline: System
    """The dense baseline, or the seed if there is no dense baseline."""
    ensemble: System
    """The ensemble with the default routing, or with the first that was evaluated. Never chosen by
    its scores, since they come from the text that the comparison is made on."""

    @property
    def change(self) -> float:
        """Change of the mean perplexity in percent; below zero the ensemble is better."""
        after, before = self.means[self.ensemble], self.means[self.baseline]
        return 100 * (after.perplexity / before.perplexity - 1)

    @property
    def ratios(self) -> list[float]:
        """Ratio of the ensemble's perplexity to the baseline's, for each language."""
        after, before = self.scores[self.ensemble], self.scores[self.baseline]
        return [after[tag].perplexity / before[tag].perplexity for tag in self.languages]

    def change_over(self, languages: Sequence[str], baseline: System | None = None) -> float | None:
        """As `change`, of other languages or from another baseline; None if a score is missing."""
        before = self.scores.get(baseline or self.baseline, {})
        after = self.scores[self.ensemble]
        if not languages or any(tag not in before or tag not in after for tag in languages):
            return None
        ratio = _mean(after, languages).perplexity / _mean(before, languages).perplexity
        return 100 * (ratio - 1)


def compare(facts: Facts) -> Comparison | None:
    """Compares the ensemble with dense, or else with the seed; None if there are no scores."""
    baseline = next((system for system in (DENSE, SEED) if system in facts.scores), None)
    shared = [t for t in facts.evaluated if all(t in facts.scores[s] for s in facts.systems)]
    unspelled = facts.marked("?")
    languages = [tag for tag in shared if tag in facts.languages and tag not in unspelled]
    if baseline is None or not facts.ensembles or not languages:
        return None
    return Comparison(
        scores=facts.scores,
        languages=languages,
        means={system: _mean(facts.scores[system], languages) for system in facts.systems},
        baseline=baseline,
        ensemble=facts.ensembles[0],
    )


def verdict(facts: Facts, comparison: Comparison | None) -> list[str]:
    """The result in sentences, the most important first."""
    if not facts.scores:
        return ["This RUN has not been evaluated yet, so nothing is known about its quality."]
    if not facts.ensembles:
        return ["Only single models have been evaluated: there is no ensemble yet."]
    if comparison is None:
        return [
            *_doubts(facts),
            "No language of the RUN's corpus that the tokenizer can spell was evaluated with every "
            "system.",
        ]
    return [
        *_doubts(facts),
        _headline(comparison, facts.marked("!")),
        *_numbers(comparison, facts.ensembles),
        *_compute(facts, comparison),
        *_outside(facts, comparison),
    ]


def _doubts(facts: Facts) -> Iterator[str]:
    """Sentences on faults of the evaluated text, which come before any score."""
    texts = facts.texts
    trained = [f"{language_name(t)} {texts[t].trained_share or 0:.0%}" for t in facts.marked("!")]
    if trained:
        yield (
            "These figures are not of held-out text: documents are in the text that was trained "
            f"on, as they are or nearly so ({listed(trained)}). They are marked !."
        )
    unknown = [f"{language_name(t)} {texts[t].unknown_share or 0:.0%}" for t in facts.marked("?")]
    if unknown:
        yield (
            f"The tokenizer does not know the characters of {listed(unknown)}: perplexities there "
            "mean nothing, are marked ? and are in no mean."
        )


def _mean(scores: Mapping[str, Score], languages: Sequence[str]) -> Score:
    return Score(*np.mean([scores[tag] for tag in languages], axis=0))


def _headline(comparison: Comparison, trained: Sequence[str]) -> str:
    """Whether the ensemble is better; `trained` are the languages whose text was trained on, which
    the sentence itself says, since it may be quoted alone."""
    known = [tag for tag in comparison.languages if tag in trained]
    if not known:
        subject = "The ensemble"
    elif len(known) == len(comparison.languages):
        subject = "On text that was trained on, the ensemble"
    else:
        part = f"in {len(known)} of {plural(len(comparison.languages), 'language')}"
        subject = f"On text that was trained on {part}, the ensemble"
    count, change, other = len(comparison.ratios), comparison.change, _NAMES[comparison.baseline]
    better = sum(ratio < 1 for ratio in comparison.ratios)
    share = f"{'only ' if 2 * better < count else ''}{better}" if better else "none"
    wins = f"it is better in {share} of {plural(count, 'language')}"
    if signed(change) == "0.0":
        return f"{subject} is as good as {other}: their mean perplexities are equal, and {wins}."
    size, word = ("better", "lower") if change < 0 else ("worse", "higher")
    agree = "and" if (2 * better > count) == (change < 0) else "but"
    return (
        f"{subject} is {size} than {other}: its mean perplexity is {abs(change):.1f} % {word}, "
        f"{agree} {wins}."
    )


def _numbers(comparison: Comparison, ensembles: Sequence[System]) -> Iterator[str]:
    means, ratios, ensemble = comparison.means, comparison.ratios, comparison.ensemble
    before = ", ".join(
        f"{perplexity(means[system].perplexity)} for {name}"
        for system, name in _NAMES.items()
        if system in means
    )
    usual = ", the default" if ensemble.routing == DEFAULT else ""
    yield (
        f"The mean perplexity over {plural(len(ratios), 'language')} of the RUN's corpus is "
        f"{before}, and {perplexity(means[ensemble].perplexity)} for the ensemble (routing by "
        f"{ensemble.routing}{usual}{_given(ensemble)})."
    )
    best = min(ensembles, key=lambda system: means[system].perplexity)
    if best != ensemble:
        yield (
            f"Of {len(ensembles)} routings the lowest on this text is that by {best.routing}"
            f"{_given(best)}: {perplexity(means[best].perplexity)}."
        )
    if len(ratios) > 1:
        typical = 100 * math.expm1(sum(map(math.log, ratios)) / len(ratios))
        yield (
            f"The change is {signed(typical)} % when every language weighs the same (geometric "
            "mean of the ratios)."
        )


def _given(ensemble: System) -> str:
    return ", which is given the language" if ensemble.routing == "language" else ""


def _compute(facts: Facts, comparison: Comparison) -> Iterator[str]:
    experts, dense = facts.branched_tokens, facts.tokens(DENSE)
    if comparison.baseline == SEED:
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
    if facts.grown:
        yield (
            f"The ensemble also holds {plural(len(facts.grown), 'grown expert')} "
            f"({listed([expert.name for expert in facts.grown])}), trained on "
            f"{sum(expert.tokens for expert in facts.grown):,} tokens more."
        )
    changes = [
        f"{language_name(tag)} {signed(change)} %"
        for tag in dict.fromkeys(tag for expert in facts.grown for tag in expert.languages)
        if (change := comparison.change_over([tag], SEED)) is not None
    ]
    if changes:
        yield (
            f"Perplexity of the grown languages, from the seed to the ensemble: {listed(changes)}."
        )
    known = (*comparison.languages, *facts.marked("?"))
    outside = [tag for tag in facts.evaluated if tag not in known]
    if outside:
        yield (
            "Not in the mean, since not all systems were trained or scored on "
            f"{'it' if len(outside) == 1 else 'them'}: {named(outside)}."
        )
