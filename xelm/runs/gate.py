"""The gate before publication: an expert is compared with its parent and the seed on held-out
text."""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from clustering.errors import UserError
from experts.expert import SEED, Expert
from experts.history import retired_since
from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage
from xelm.data.vocabulary import in_pieces_of
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.progress import bar
from xelm.runs.run import Run
from xelm.runs.shares import held_out_text, parent_directory
from xelm.runs.vocabulary import vocabulary_of

_QUIET_TOKENS = 20_000
"""Number of tokens that are read without a progress bar."""
Figures = dict[str, dict[str, float]]
"""Language -> model -> bits a byte on held-out text; and "documents", how many were read."""


def evaluate_held_out(
    run: Run, expert: Expert, text: Sequence[LanguageShare]
) -> dict[str, Figures]:
    """Figures of a trained expert, its parent and the seed, "expert", "parent" and "seed", and of
    the version in use, "present", if that is another than its parent: "own" on its own languages
    and, if the gate asks for them, "others" on the other languages of the RUN.

    text: held-out documents that the expert is for. Measured as by `xelm evaluate`, on the first
    documents of each language up to `gate.tokens`.
    """
    gate, parent = run.config.gate, parent_directory(run, expert)
    models = {"expert": expert.directory(run.directory), "parent": parent, "seed": run.seed}
    if present := in_use(run, expert):
        models["present"] = present.directory(run.directory)
    found = {"own": _bits_per_byte(run, models, text, gate.tokens)}
    languages = expert.languages or tuple(expert.documents or ())
    if gate.others is not None:
        others = held_out_text(run, but=languages)
        models = {"expert": models["expert"], "parent": parent}
        found["others"] = _bits_per_byte(run, models, others, gate.tokens)
    missing = [tag for tag in languages if tag not in found["own"]]
    if missing:
        print(
            f"{expert.reference}: no text of {', '.join(missing)} is held out, so that it is not "
            "compared with its parent there",
            file=sys.stderr,
        )
    return found


def in_use(run: Run, expert: Expert) -> Expert | None:
    """The published version that an expert would replace; None if it is its parent, or there is
    none."""
    published = [e for e in run.registry().published() if e.name == expert.name]
    return next((e for e in published if e.reference != expert.parent), None)


def check_gate(run: Run, expert: Expert, figures: Mapping[str, Figures]) -> None:
    """Raises UserError, with the figures, for an expert that the gate refuses, and keeps the reason
    for `xelm status`."""
    if refusal := refusal_of(run, expert, figures):
        reason = (
            f"{expert.reference} is not published: {refusal}; its checkpoint is kept: publish it "
            f"all the same with xelm publish {run.directory} {expert.name}, or delete it with xelm "
            "discard"
        )
        run.failure(expert.name).parent.mkdir(exist_ok=True)
        run.failure(expert.name).write_text(reason, encoding="utf-8")
        raise UserError(reason)


def refusal_of(run: Run, expert: Expert, figures: Mapping[str, Figures]) -> str | None:
    """Why the gate refuses an expert: figures in which it is worse than allowed, that it was
    trained here and none of its text is held out to measure it, or that the expert was retired
    meanwhile; None if it passes."""
    if retired_since(run.registry().history, expert.reference):
        return f"{expert.name} was retired after its training began"
    gate = run.config.gate
    measurable = run.config.held_out.share > 0 and expert.made is None
    if measurable and gate.worse is not None and not figures["own"]:
        languages = ", ".join(expert.languages or expert.documents or ())
        return (
            f"it has so few documents in {languages} that none is held out, and so nothing says "
            f"that it is no worse than {expert.parent} (give more text)"
        )
    faults = [
        *_faults(figures["own"], "parent", expert.parent, gate.worse),
        *_faults(figures["own"], "seed", SEED, gate.worse if expert.parent != SEED else None),
        *_faults(figures.get("others", {}), "parent", expert.parent, gate.others),
    ]
    measured = any("present" in found for found in figures["own"].values())
    if measured and (present := in_use(run, expert)):
        faults += _faults(figures["own"], "present", present.reference, gate.worse)
    more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
    return f"on held-out text it has {'; '.join(faults[:5])}{more}" if faults else None


def _faults(figures: Figures, model: str, name: str, allowed: float | None) -> Iterator[str]:
    for tag, found in figures.items():
        if allowed is not None and not found["expert"] <= found[model] * (1 + allowed):
            worse = found["expert"] / max(found[model], 1e-9) - 1
            yield (
                f"{found['expert']:.3f} bits a byte in {tag}, and {name} {found[model]:.3f} "
                f"({worse:+.1%}, at most {allowed:+.1%} wanted)"
            )


def _bits_per_byte(
    run: Run, models: Mapping[str, Path], text: Sequence[LanguageShare], most_tokens: int
) -> Figures:
    text_format = run.tokenizer().text_format
    sources = Counter(source.ids.language for source in text)
    chosen: dict[str, list[tuple[TokenizedLanguage, np.ndarray]]] = {tag: [] for tag in sources}
    for source in text:  # a language may have several
        tag = source.ids.language
        chosen[tag].append((source.ids, _first(source, most_tokens // sources[tag])))
    found: Figures = {
        tag: {"documents": sum(len(numbers) for _, numbers in some)} for tag, some in chosen.items()
    }
    paths = dict.fromkeys(models.values()) if text else {}
    parts = [part for some in chosen.values() for part in some]
    size = sum(int(ids.lengths[numbers].sum()) for ids, numbers in parts)
    with bar(len(paths), "held-out text", "model", shown=size > _QUIET_TOKENS) as progress:
        for path in paths:
            shape, vocabulary = read_config(path), vocabulary_of(run, path)
            parameters = jax.device_put(read_for_inference(path, shape))
            for tag, some in chosen.items():
                read = some
                if vocabulary is not None:
                    read = [(in_pieces_of(ids, vocabulary.key), numbers) for ids, numbers in some]
                scores = score_documents(
                    shape,
                    parameters,
                    [ids.document(number) for ids, numbers in read for number in numbers],
                    text_format=text_format,
                    context_length=run.context_length(),
                )
                nats = -math.fsum(float(each.sum(dtype=np.float64)) for each in scores)
                count = sum(int(ids.bytes[numbers].sum()) for ids, numbers in some)
                bits = nats / math.log(2) / max(1, count)
                found[tag] |= {name: bits for name, other in models.items() if other == path}
            progress.update(1)
    return found


def _first(source: LanguageShare, most_tokens: int) -> np.ndarray:
    """Numbers of the first documents of a source, up to so many tokens but at least one."""
    numbers = source.documents
    assert numbers is not None
    fitting = int((np.cumsum(source.ids.lengths[numbers]) <= most_tokens).sum())
    return numbers[: max(1, fitting)]
