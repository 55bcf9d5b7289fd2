"""Results of an evaluation: rows by system and language, summaries over languages, and their JSON.
Imports no JAX, so that tables and reports stay quick."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from xelm.data.text_stats import TextStats
from xelm.settings import from_json

_MOST_NATS = 700.0
"""Nats per token above which the exponential is not a finite number."""


Interval = tuple[float, float]
"""95 % interval: percentiles 2.5 and 97.5 of a bootstrap over documents (Efron 1979)."""


class System(NamedTuple):
    """What is measured: a single model, or the ensemble under a routing."""

    name: str
    """seed, dense, the name of an expert, that of a model which is made of several (merges/NAME,
    students/NAME, mixes/NAME), or ensemble."""
    routing: str | None = None
    """Routing of the ensemble; None for a single model."""

    @property
    def title(self) -> str:
        """Name for readers, such as `ensemble by learned`."""
        return f"{self.name} by {self.routing}" if self.routing else self.name

    @property
    def is_combined(self) -> bool:
        """Whether it is one model that is made of several: merged, distilled or mixed. No expert
        has a name with a slash."""
        return "/" in self.name


SEED, DENSE = System("seed"), System("dense")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How well the probability of the likeliest token fits how often that token comes."""

    tokens: int
    """Number of tokens in the sample."""
    accuracy: float
    """Share of the tokens at which the likeliest token came."""
    ece: float
    """Expected calibration error of its probability (Guo et al. 2017, arXiv 1706.04599)."""
    brier: float
    """Mean over tokens of sum_v (p_v - [v came])^2: 0 at best, 2 at worst (Brier 1950)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStats:
    """How a router weighs the experts on some text; means over its tokens."""

    accuracy: float
    """Share of the tokens at which the largest weight is that of the expert for the language: the
    one that serves it or, where none does, the expert that is best on its text."""
    ece: float
    """Expected calibration error of the largest weight."""
    entropy: float
    """Entropy of the weights in bits: 0 where one has all, log2 E where all are equal."""
    experts_read: float
    """Number of experts that have weight, or that the router needs to read the text."""
    regret: float | None
    """Bits per byte more than the best single expert of the language takes; negative where the
    mixture is better. None where not every expert was scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Score of one system on one language."""

    system: str
    """Name of the system, as in `System`."""
    routing: str | None
    """Routing of the ensemble; None for a single model."""
    language: str
    """Canonical tag."""
    documents: int
    """Number of documents scored."""
    tokens: int
    """Number of predicted tokens: the ends of documents, too; first tokens behind a start token."""
    bytes: int
    """Number of UTF-8 bytes of the documents."""
    nll: float
    """Negative log-likelihood of all documents together, in nats."""
    perplexity_95: Interval | None = None
    """Interval of the perplexity; None for a single document."""
    bits_per_byte_95: Interval | None = None
    """Interval of the bits per byte; None for a single document."""
    calibration: Calibration | None = None
    """Calibration on a sample of the tokens; None where it was not measured."""
    router: RouterStats | None = None
    """Statistics of the router of an ensemble; None for a single model."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Row":
        """The row of an entry of results.json; ValueError for impossible numbers."""
        names = [field.name for field in fields(cls)]
        row = from_json(cls, {name: item for name, item in value.items() if name in names})
        if not (row.tokens > 0 and row.bytes > 0 and 0 <= row.nll / row.tokens < _MOST_NATS):
            raise ValueError(f"{row.nll} nats over {row.tokens} tokens, {row.bytes} bytes")
        return row

    @property
    def perplexity(self) -> float:
        """exp(nats per token); comparable only with the same tokenizer."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; comparable across tokenizers, not across scripts."""
        return self.nll / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        """The row with its perplexity and bits per byte, as in results.json."""
        means = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | means


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    interval: Interval | None
    """None where a language has a single document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Means of one system over several languages; each language counts the same."""

    system: str
    """Name of the system, as in a row."""
    routing: str | None
    """Routing of the ensemble, as in a row."""
    languages: Sequence[str]
    """Languages of the RUN's corpus on which every system was scored, single experts excepted; for
    a system that has none of them, those on which it was scored."""
    perplexity: float
    """Mean perplexity."""
    bits_per_byte: Estimate
    """Mean bits per byte."""
    above_dense: Estimate | None
    """Mean of the bits per byte more than the dense baseline takes, on the same samples."""
    forgetting: Estimate | None
    """For an expert: mean of the bits per byte more than the seed takes, over those languages of
    the RUN's corpus that the expert was not trained on."""
    transfer_gap: Estimate | None
    """Mean share of the seed's bits per byte that is saved in languages that the system was trained
    on since, less that in languages that it was not trained on."""
    calibration: Calibration | None
    """Calibration on the samples of all these languages."""
    router: RouterStats | None
    """Statistics of the router over all these tokens; the regret is the mean of languages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All results of one evaluation."""

    rows: Sequence[Row]
    """One row for each system and language."""
    summaries: Sequence[Summary] = ()
    """One summary for each system."""
    texts: Mapping[str, TextStats] = field(default_factory=dict)
    """Statistics of the evaluated text, by language."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Everything in results.json; empty before it is written."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Results":
        """The results in a results.json; UserError, KeyError, TypeError, ValueError if damaged."""
        return cls(
            rows=[Row.from_json(row) for row in record["rows"]],
            summaries=[from_json(Summary, one) for one in record.get("summaries", ())],
            texts={tag: TextStats.from_json(one) for tag, one in record.get("texts", {}).items()},
            record=record,
        )

    def to_json(self) -> dict[str, Any]:
        """Rows, summaries and text, as in results.json."""
        return {
            "rows": [
                {**row.to_json(), "marks": self.texts[row.language].marks} for row in self.rows
            ],
            "summaries": [asdict(summary) for summary in self.summaries],
            "texts": {tag: text.to_json() for tag, text in self.texts.items()},
        }
