"""Cells of the tables of an evaluation, as text: the terminal and the report lay them out."""

from xelm.data.text_stats import TextStats
from xelm.evaluation.results import Estimate, Summary

NONE = "-"
"""Cell of a number that was not measured."""


def score_cells(summary: Summary) -> list[str]:
    """Bits per byte and its interval, bits per byte above dense and its interval, and of the
    calibration the accuracy, expected error and Brier score."""
    known = summary.calibration
    measured = (known.accuracy, known.ece, known.brier) if known else (None, None, None)
    return [
        f"{summary.bits_per_byte.value:.3f}",
        _interval(summary.bits_per_byte),
        NONE if summary.above_dense is None else f"{summary.above_dense.value:+.3f}",
        _interval(summary.above_dense, "+"),
        *(NONE if value is None else f"{value:.3f}" for value in measured),
    ]


def router_cells(summary: Summary) -> list[str]:
    """Accuracy, expected calibration error, entropy, experts read and regret of a router."""
    found = summary.router
    if found is None:
        return [NONE] * 5
    return [
        f"{found.accuracy:.1%}",
        f"{found.ece:.3f}",
        f"{found.entropy:.3f}",
        f"{found.experts_read:.2f}",
        NONE if found.regret is None else f"{found.regret:+.3f}",
    ]


def text_cells(text: TextStats) -> list[str]:
    """Documents, tokens, bytes, tokens per character, and the shares or numbers of unknown
    characters, byte pieces, copies and documents that were trained on."""
    return [
        f"{text.documents:,}",
        f"{text.tokens:,}",
        f"{text.bytes:,}",
        f"{text.tokens_per_character:.2f}",
        _share(text.unknown_share, "?" * text.unspelled),
        _share(text.byte_share),
        f"{text.duplicates:,}",
        _share(text.trained_share, "!" * text.trained),
    ]


def _interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None or estimate.interval is None:
        return ""
    return "..".join(f"{end:{sign}.3f}" for end in estimate.interval)


def _share(value: float | None, mark: str = "") -> str:
    return NONE if value is None else f"{value:.1%}{mark}"
