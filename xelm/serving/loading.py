"""Loading: the models of a server are opened, and the programs that the first request needs are
compiled, while it listens already and says how far that is."""

import sys
import threading
from collections.abc import Callable

from xelm.inference.engine import Engine
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import GREEDY
from xelm.serving.models import ServedModels
from xelm.serving.reload import Opener
from xelm.serving.scheduler import Scheduler


class Loading(threading.Thread):
    """Thread that loads the models of a scheduler that has none yet, and ends."""

    def __init__(
        self, opener: Opener, scheduler: Scheduler, ended: Callable[[Exception | None], object]
    ):
        """ended: called in this thread when the scheduler has its models, or with an error."""
        # As a daemon it does not keep a process from ending that is stopped meanwhile.
        super().__init__(name="loading", daemon=True)
        self._opener, self._scheduler, self._ended = opener, scheduler, ended

    def run(self) -> None:
        error: Exception | None = None
        try:
            models = self._opener(report=self._report)
            self._report("compiling")
            compile_first_programs(models)
            self._scheduler.replace_models(models)
            print(f"serving {', '.join(models.routers)}", file=sys.stderr, flush=True)
        except Exception as found:
            error = found
        self._ended(error)

    def _report(self, stage: str) -> None:
        self._scheduler.stage = f"loading: {stage}"


def compile_first_programs(models: ServedModels) -> None:
    """Compiles the programs that the first request needs."""
    router = list(models.routers.values())[1]
    engine = Engine(models.ensemble)
    ids = [models.ensemble.tokenizer.prefix_id] * 2
    engine.add(GenerationRequest(ids=ids, sampling=GREEDY), router)
    for _ in range(2):
        engine.step()
