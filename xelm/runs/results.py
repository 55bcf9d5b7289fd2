"""results.json of a RUN. Imports no JAX, so that tables and reports stay quick."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, remove_unfinished, sha256, write_json
from experts.expert import Expert
from experts.lock import locked
from xelm.evaluation.results import Results
from xelm.runs.run import Run
from xelm.version import __version__

RESULTS = "results.json"


def read_results(run: Run) -> Results:
    """The newest evaluation of a RUN, without rows if there was none. UserError if results.json is
    damaged."""
    path = run.results / RESULTS
    if not path.exists():
        return Results(rows=[])
    record = read_json(path)
    try:
        return Results.from_json(record)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run xelm evaluate again") from error


def write_results(
    run: Run,
    corpus: str,
    options: Mapping[str, Any],
    results: Results,
    experts: Sequence[Expert] = (),
) -> Results:
    """Writes the results of an evaluation as results.json, and returns them with their record. A
    results.json of other text or other options is kept under another name. experts: those that were
    measured; one that was removed since is left out, and one that was renamed has its new name."""
    path = run.results / RESULTS
    record = {"format": 1, "xelm": __version__, "corpus": corpus, **options, **results.to_json()}
    with locked(run.directory, "evaluate", wait_seconds=60.0):
        if names := _changed_names(run, experts):
            record = _with_systems(record, names)
            results = Results.from_json(record)
            print(f"changed while they were measured: {', '.join(names)}", file=sys.stderr)
        if path.exists():
            before = {}
            with suppress(UserError):  # a damaged file is kept under another name
                before = read_json(path)
            if any(before.get(name) != value for name, value in options.items()):
                kept = path.with_name(f"results-{sha256(path)[:8]}.json")
                path.rename(kept)
                print(f"results of other text or options are kept in {kept}", file=sys.stderr)
        write_json(path, record)
    return replace(results, record=record)


def _changed_names(run: Run, experts: Sequence[Expert]) -> dict[str, str | None]:
    """Names of experts that have another name by now -> that name, or None if they were removed."""
    present = {e.first_reference: e for e in run.registry().experts if e.removed is None}
    now = {expert.name: present.get(expert.first_reference) for expert in experts}
    names = {name: found.name if found else None for name, found in now.items()}
    return {name: new for name, new in names.items() if new != name}


def _with_systems(record: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """The content of a table of an evaluation with other names of systems; None removes the rows,
    and the content says so. names: present -> new name."""
    changed = dict(record)
    for part in ("rows", "summaries"):
        each = [row for row in record.get(part, ()) if isinstance(row, dict)]
        named = [row | {"system": names.get(row["system"], row["system"])} for row in each]
        changed[part] = [row for row in named if row["system"] is not None]
    if gone := [name for name, new in names.items() if new is None]:
        changed["removed"] = sorted({*record.get("removed", ()), *gone})
    return changed


def change_systems(run: Run, names: Mapping[str, str | None], *, change: bool = True) -> list[str]:
    """Gives systems in all tables of evaluations of a RUN other names, and returns the names of the
    files that have any of them. names: present -> new name; None removes the rows, and the file
    says that it was measured with this expert. change: whether to write. The caller has the lock
    "evaluate"."""
    found = []
    for path in sorted(run.results.glob("results*.json")):
        if change:
            remove_unfinished(path)
        with suppress(UserError):  # a damaged file has no names
            record = read_json(path)
            changed = _with_systems(record, names)
            if all(changed[part] == record.get(part, []) for part in ("rows", "summaries")):
                continue
            found.append(path.name)
            if change:
                write_json(path, changed)
    return found
