"""`xelm quickstart`: every step on the embedded sample corpus."""

from importlib.resources import as_file, files
from pathlib import Path

from clustering import typology
from xelm.evaluation.results import Results
from xelm.presets import quickstart as preset
from xelm.runs.branch import branch
from xelm.runs.evaluate import evaluate
from xelm.runs.grow import grow
from xelm.runs.init import init
from xelm.runs.options import InitOptions
from xelm.runs.report import report
from xelm.runs.run import Run
from xelm.runs.train import train_dense, train_experts

LANGUAGES = ("ar", "bg", "de", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "zh")
NEW_LANGUAGES = ("pl", "sv")
CLUSTERS = 7


def quickstart(directory: str | Path) -> tuple[Run, Results, Path]:
    """Clusters the sample's languages by typology, trains a seed, the dense baseline and an expert
    for each cluster, grows an expert for another language, evaluates all, and writes the report.
    Returns the RUN, the results and the path of the report. An interrupted quickstart resumes."""
    with as_file(files("xelm") / "sample") as sample:
        run = init(directory, sample / "train", preset(), InitOptions(languages=LANGUAGES))
        branch(run, typology.cluster(LANGUAGES, CLUSTERS))
        train_dense(run)
        train_experts(run, run.untrained())
        if not any(NEW_LANGUAGES[0] in e.languages for e in run.registry().published()):
            grow(run, NEW_LANGUAGES[0], sample / "train")
        results = evaluate(run, sample / "valid")
    return run, results, report(run)
