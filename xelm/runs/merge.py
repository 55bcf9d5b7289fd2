"""`xelm merge`: the average of the weights of experts, as one checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from experts.merge import average
from xelm.runs.check import check_models
from xelm.runs.ensembles import published
from xelm.runs.run import Run


def merge(run: Run, out: str | Path, names: Sequence[str] = ()) -> Path:
    """Writes the average of these experts, or of all published ones, into `out`, as
    `experts.merge.average` does; returns `out`."""
    registry = run.registry()
    experts = [registry.in_use(name) for name in names] or published(run)
    check_models(run, experts)
    return average([expert.directory(run.directory) for expert in experts], out=out)
