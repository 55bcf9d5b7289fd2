"""What was evaluated: the rows of results.json. Imports no JAX, so that its readers stay quick."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json
from xelm.runs.run import Run

RESULTS = "results.json"
_MOST_NATS = 700.0
"""A token, of which the exponential is a number still."""


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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Row":
        """From a row of results.json; ValueError for numbers that cannot be."""
        row = cls(**{field.name: value[field.name] for field in fields(cls)})
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
            "bits_per_byte": self.bits_per_byte,
        }


def read_results(run: Run) -> tuple[Mapping[str, Any], list[Row]]:
    """results.json of a RUN, and its rows; nothing if there was no evaluation. UserError if it is
    damaged."""
    path = run.results / RESULTS
    if not path.exists():
        return {}, []
    record = read_json(path)
    try:
        return record, [Row.from_json(row) for row in record["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run xelm evaluate again") from error
