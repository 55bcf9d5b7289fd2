"""Train, grow and run cross-lingual expert language models (X-ELM).

    from xelm import open_run

    run = open_run("RUN")                            # run.train(), run.grow(), run.evaluate(), ...
    ensemble = run.ensemble(routing="learned", top_m=2)
    print(ensemble.generate("Habari ya asubuhi", max_new_tokens=40).text)
    scores = ensemble.score(["Habari ya asubuhi"])   # nats by text, weights by expert

A RUN, one X-ELM on disk (the directory that most commands take):
    init            make one from a corpus, with a configuration of xelm.presets
    plan_init       what that would cost, without making it
    open_run        open one
    pull            download one from the Hugging Face Hub
    quickstart      make a small one on the embedded sample corpus
    Run             what these return: help(xelm.Run) lists what can be done with it
    InitOptions, LaunchOptions, GrowOptions, EvaluationOptions, Routing
                    options of init, Run.train, Run.grow, Run.evaluate and Run.ensemble

One checkpoint of any supported family, as on the Hugging Face Hub:
    load_model      a model to call: int [B, T] tokens -> float [B, T, V] logits
    save_model      write it so that transformers loads it

The packages `clustering` and `experts` have the clusters and the registry. Importing this package
imports nothing heavy; the names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xelm.version import __version__

if TYPE_CHECKING:
    from xelm.api import (
        EvaluationOptions,
        GrowOptions,
        InitOptions,
        LaunchOptions,
        Routing,
        Run,
        init,
        open_run,
        pull,
        quickstart,
    )
    from xelm.models.checkpoint import load_model, save_model
    from xelm.runs.init import plan_init

_HOMES = {
    "load_model": "xelm.models.checkpoint",
    "plan_init": "xelm.runs.init",
    "save_model": "xelm.models.checkpoint",
}
"""Name -> its module; all others are in xelm.api."""
__all__ = [
    "EvaluationOptions",
    "GrowOptions",
    "InitOptions",
    "LaunchOptions",
    "Routing",
    "Run",
    "__version__",
    "init",
    "load_model",
    "open_run",
    "plan_init",
    "pull",
    "quickstart",
    "save_model",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'xelm' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "xelm.api")), name)
