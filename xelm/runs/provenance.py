"""Provenance of an expert: the text that it was trained on, by language and corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clustering.files import read_json
from xelm.data.rows import LanguageShare
from xelm.data.store import FORMAT
from xelm.runs.jobs import Job


def provenance(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Language of the text of a training -> one entry for each tokenised corpus: "text", its name
    under RUN/corpus; "corpus", as it was described; "files", "sha256" and "sources" as
    `Reading.origins` found them; and the numbers of "documents", "tokens" and "bytes" that were
    trained on, and of documents "held_out".
    "role" says what the language is for the model: "own", "donor" or "replay"; and "share" is its
    part of the rows.

    Of a corpus that was tokenised before its origins were recorded, "files" and "sources" are
    None, and "sha256" is that of all its languages together."""
    text, own = job.text, {source.ids.language for source in job.own.sources}
    roles = dict.fromkeys(job.replayed, "replay") | dict.fromkeys(own, "own")
    away = {_place(source): _numbers(source) for source in text.held_out}
    found: dict[str, list[dict[str, Any]]] = {}
    for source in text.sources:
        ids, numbers = source.ids, _numbers(source)
        record = read_json(ids.directory / "store.json", FORMAT)
        origin = record.get("origins", {}).get(ids.language, {})
        found.setdefault(ids.language, []).append(
            {
                "text": ids.directory.name,
                "role": roles.get(ids.language, "donor"),
                "share": round(source.share / text.share, 6),
                "corpus": record["corpus"],
                "files": origin.get("files"),
                "documents": len(numbers),
                "held_out": len(away.get(_place(source), ())),
                "tokens": int(ids.lengths[list(numbers)].sum()),
                "bytes": int(ids.bytes[list(numbers)].sum()),
                "sha256": origin.get("sha256", record["corpus_sha256"]),
                "sources": origin.get("sources"),
            }
        )
    return found


def _place(source: LanguageShare) -> tuple[Path, str]:
    return source.ids.directory, source.ids.language


def _numbers(source: LanguageShare) -> Sequence[int]:
    return range(len(source.ids)) if source.documents is None else source.documents.tolist()
