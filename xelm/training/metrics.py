"""metrics.jsonl: one line every few steps, cut back to the checkpoint when a training resumes."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a JSONL file, and to TensorBoard events beside it if asked."""

    def __init__(self, path: str | Path, *, last_step: int, tensorboard: bool = False):
        """Lines after `last_step` are of steps that will be done again, and are dropped."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= last_step]
        rewritten = self.path.with_name(f".{self.path.name}.partial")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(rewritten, self.path)
        self._file = self.path.open("a")
        self._events = None
        if tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(self.path.parent / "tensorboard"))

    def write(self, line: dict[str, Any]) -> None:
        """One line of plain numbers; "step" says where it belongs."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if it does not exist. A last line cut short by a crash
    is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines
