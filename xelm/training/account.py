"""What a training has seen and how it goes: counted, shown, logged, and given up if it fails."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from clustering.errors import UserError
from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.progress import bar
from xelm.training.flops import of_a_token, peak
from xelm.training.metrics import MetricsLog
from xelm.training.step import Metrics


class DivergedError(UserError):
    """Steps are no use any more; the settings or the text do not suit the model."""


class Account:
    """Of one training in one process."""

    def __init__(
        self,
        log: MetricsLog | None,
        config: TrainConfig,
        model: ModelConfig,
        label: str,
        first: int,
        seen: Mapping[str, int],
        devices: int,
    ):
        """first: steps done before. seen: language -> targets in them, in the order of the sources
        that batches are mixed of. devices: that it runs on. log: None on all hosts but the
        first."""
        self.seen = dict(seen)
        self._log, self._config, self._model, self._label = log, config, model, label
        self._languages = list(seen)
        self._bar = bar(config.steps * config.tokens_per_step, label, "tok", shown=log is not None)
        self._bar.update(first * config.tokens_per_step)
        self._clock, self._step, self._tokens = time.perf_counter(), first, sum(seen.values())
        self._preparing = 0.0
        self._flops = of_a_token(model, config.sequence_length) * config.tokens_per_step
        self._peak = peak(config.runtime.dtype, devices)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Whatever is done in here is done to get the next batch, while no step is begun."""
        began = time.perf_counter()
        yield
        self._preparing += time.perf_counter() - began

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds the targets of a batch; of an encoder, its tokens."""
        segments = batch["segments"]
        targets = segments[:, :-1] > 0
        if self._model.causal:
            targets = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        for index, count in zip(batch["language"], targets.sum(axis=1)):
            self.seen[self._languages[int(index)]] += int(count)
        self._bar.update(self._config.tokens_per_step)

    def due(self, step: int) -> bool:
        """Whether a step is reported whatever else happens. Reports wait for the device."""
        return step == 1 or step % self._config.runtime.log_every == 0

    def report(
        self, step: int, metrics: Metrics, rate: float, batch: Mapping[str, np.ndarray]
    ) -> None:
        """Looks at what a step gave, and writes it down if it is one of `log_every` or the last.
        Raises DivergedError where steps are no use any more."""
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        found = f"loss {loss:g} and gradient norm {norm:g}"
        if step == 1 and not math.isfinite(loss + norm):
            raise UserError(
                f"{self._label} has {found} before anything was learned: look at what it starts "
                "from"
            )
        if metrics.most_in_a_row >= self._config.runtime.skip_limit:
            raise self.diverged(
                f"{metrics.most_in_a_row} steps in a row were skipped; at step {step} it has "
                f"{found}, and reads rows {self._origin(batch)}"
            )
        if step % self._config.runtime.log_every and step != self._config.steps:
            return
        now, total = time.perf_counter(), sum(self.seen.values())
        line = {
            "step": step,
            "steps": self._config.steps,
            "tokens": total,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped": int(metrics.skipped),
            "tokens_per_second": (total - self._tokens) / (now - self._clock),
            "data_share": self._preparing / (now - self._clock),
            "language_tokens": dict(self.seen),
        }
        if self._peak is not None:
            rate_of_steps = (step - self._step) / (now - self._clock)
            line["utilisation"] = self._flops * rate_of_steps / self._peak
        if self._log is not None:
            self._log.write(line)
        self._clock, self._step, self._tokens, self._preparing = now, step, total, 0.0
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def close(self) -> None:
        """Ends the files and the bar."""
        if self._log is not None:
            self._log.close()
        self._bar.close()

    def diverged(self, why: str) -> DivergedError:
        """The mistake of settings, or text, that do not suit the model."""
        return DivergedError(
            f"the training of {self._label} has diverged: {why}; a peak rate of "
            f"{self._config.optimizer.learning_rate:g} may be too much for it"
        )

    def _origin(self, batch: Mapping[str, np.ndarray]) -> str:
        rows: dict[str, list[str]] = {}
        for index, row in zip(batch["language"].tolist(), batch["row"].tolist()):
            rows.setdefault(self._languages[index], []).append(str(row))
        return "; ".join(f"{language} {', '.join(some)}" for language, some in rows.items())
