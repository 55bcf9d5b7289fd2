"""What was evaluated: results.json. Imports no JAX, so that its readers stay quick."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from experts.lock import locked
from xelm.runs.run import Run
from xelm.runs.texts import LanguageText
from xelm.version import __version__

RESULTS = "results.json"
_MOST_NATS = 700.0
"""A token, of which the exponential is a number still."""


Interval = tuple[float, float]
"""Holds the value in 95 of 100 samples: percentiles of a bootstrap over documents (Efron 1979)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How sure of the next token, and how often rightly so, on a sample of the documents."""

    tokens: int
    """Of the sample."""
    accuracy: float
    """Share at which the likeliest token came."""
    ece: float
    """Expected calibration error of its probability (Guo et al. 2017, arXiv 1706.04599)."""
    brier: float
    """Mean over tokens of sum_v (p_v - [v came])^2: 0 at best, 2 at worst (Brier 1950)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What a router made of some text, by token."""

    accuracy: float
    """Share at which the largest weight is that of the expert for the language: the one that serves
    it or, where none does, the best of all there."""
    ece: float
    """Expected calibration error of the largest weight."""
    entropy: float
    """Of the weights, in bits: 0 where one expert has all, log2 E where all have the same."""
    asked: float
    """Experts with weight."""
    regret: float | None
    """Bits per byte more than the best single expert of the language, which the mixture may be
    better than; None where not every expert was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One system on one language."""

    system: str
    """seed, dense, the name of an expert, or ensemble."""
    routing: str | None
    """Of the ensemble; None for single models."""
    language: str
    """Canonical tag."""
    documents: int
    """Documents scored."""
    tokens: int
    """Predicted tokens: all but the first of each document, its end included."""
    bytes: int
    """UTF-8 bytes of the documents."""
    nll: float
    """Nats in total."""
    perplexity_95: Interval | None = None
    """None of a single document."""
    bits_per_byte_95: Interval | None = None
    """None of a single document."""
    calibration: Calibration | None = None
    """None where it was not measured."""
    router: Routed | None = None
    """Of an ensemble."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Row":
        """From a row of results.json; ValueError for numbers that cannot be."""
        found = {name: value[name] for name in _COUNTED}
        found |= {
            name: _interval(value.get(name)) for name in ("perplexity_95", "bits_per_byte_95")
        }
        for name, kind in (("calibration", Calibration), ("router", Routed)):
            part = value.get(name)
            found[name] = part and kind(**{f.name: part[f.name] for f in fields(kind)})
        row = cls(**found)
        if not (row.tokens > 0 and row.bytes > 0 and 0 <= row.nll / row.tokens < _MOST_NATS):
            raise ValueError(f"{row.nll} nats over {row.tokens} tokens, {row.bytes} bytes")
        return row

    @property
    def perplexity(self) -> float:
        """exp(nats a token); depends on the tokenizer."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable over tokenizers, not over scripts."""
        return self.nll / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        """As in results.json."""
        return {
            "system": self.system,
            "routing": self.routing,
            "language": self.language,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "perplexity_95": self.perplexity_95,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_95": self.bits_per_byte_95,
            "calibration": self.calibration and asdict(self.calibration),
            "router": self.router and asdict(self.router),
        }


_COUNTED = ("system", "routing", "language", "documents", "tokens", "bytes", "nll")


class Estimate(NamedTuple):
    """A number with its interval, if there is one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One system over several languages. Means are of languages, each counting the same."""

    system: str
    """As in a row."""
    routing: str | None
    """As in a row."""
    languages: Sequence[str]
    """Of the RUN's corpus, that every system but single experts was scored on; of a system with
    fewer, those."""
    perplexity: float
    """Mean."""
    bits_per_byte: Estimate
    """Mean."""
    above_dense: Estimate | None
    """Mean of the bits per byte more than the dense baseline takes, from the same samples."""
    forgetting: Estimate | None
    """Of an expert: mean of the bits per byte more than the seed takes, over those languages of the
    RUN's corpus that the expert was not trained on."""
    transfer_gap: Estimate | None
    """Mean share of the seed's bits per byte that is saved in languages that the system was trained
    on since, less that in those that it was not."""
    calibration: Calibration | None
    """Of all tokens of the languages' samples."""
    router: Routed | None
    """Of all tokens of the languages; the regret is the mean of languages."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """From one of results.json."""
        found = {field.name: value[field.name] for field in fields(cls)}
        for name in ("bits_per_byte", "above_dense", "forgetting", "transfer_gap"):
            part = found[name]
            found[name] = part and Estimate(part["value"], _interval(part["interval"]))
        for name, kind in (("calibration", Calibration), ("router", Routed)):
            found[name] = found[name] and kind(**found[name])
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """As in results.json."""
        found = {name: getattr(self, name) for name in [field.name for field in fields(self)]}
        for name, part in found.items():
            if isinstance(part, Estimate):
                found[name] = part._asdict()
            elif isinstance(part, Calibration | Routed):
                found[name] = asdict(part)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Of one evaluation."""

    rows: Sequence[Row]
    """By system and language."""
    summaries: Sequence[Summary] = ()
    """By system; none of an evaluation by an earlier version."""
    texts: Mapping[str, LanguageText] = field(default_factory=dict)
    """By language; none of an evaluation by an earlier version."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """All of results.json; empty before it is written."""


def read_results(run: Run) -> Results:
    """What was evaluated of a RUN, maybe nothing. UserError if results.json is damaged."""
    path = run.results / RESULTS
    if not path.exists():
        return Results(rows=[])
    record = read_json(path)
    try:
        return Results(
            rows=[Row.from_json(row) for row in record["rows"]],
            summaries=[Summary.from_json(one) for one in record.get("summaries", ())],
            texts={
                tag: LanguageText.from_json(one) for tag, one in record.get("texts", {}).items()
            },
            record=record,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run xelm evaluate again") from error


def _interval(value: Any) -> Interval | None:
    if value is None:
        return None
    low, high = value
    return float(low), float(high)


def write_results(run: Run, corpus: str, options: Mapping[str, Any], results: Results) -> Results:
    """The results of an evaluation with their record, which is written as results.json; one of
    other text or other options that lies there is kept under another name."""
    path = run.results / RESULTS
    record = {
        "format": 1,
        "xelm": __version__,
        "corpus": corpus,
        **options,
        "rows": [
            {**row.to_json(), "marks": results.texts[row.language].marks} for row in results.rows
        ],
        "summaries": [summary.to_json() for summary in results.summaries],
        "texts": {tag: text.to_json() for tag, text in results.texts.items()},
    }
    with locked(run.directory, "evaluate", wait_seconds=60.0):
        if path.exists():
            try:
                before = read_json(path)
            except UserError:  # damaged, and none of our business
                before = {}
            if any(before.get(name) != value for name, value in options.items()):
                kept = path.with_name(f"results-{sha256(path)[:8]}.json")
                path.rename(kept)
                print(f"results of other text or options are kept in {kept}", file=sys.stderr)
        write_json(path, record)
    return replace(results, record=record)
