"""results.json of a RUN. Imports no JAX, so that tables and reports stay quick."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
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


def write_results(run: Run, corpus: str, options: Mapping[str, Any], results: Results) -> Results:
    """Writes the results of an evaluation as results.json, and returns them with their record. A
    results.json of other text or other options is kept under another name."""
    path = run.results / RESULTS
    record = {"format": 1, "xelm": __version__, "corpus": corpus, **options, **results.to_json()}
    with locked(run.directory, "evaluate", wait_seconds=60.0):
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
