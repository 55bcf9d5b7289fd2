"""What a GPU computes rightly, and how fast: one command for one that is borrowed for some minutes.

    python benchmarks/gpu.py --minutes 9 [--out gpu.json]     # pip install 'xelm[cuda13]'

The parts, most important first: attention by the kernels of the device beside the reference; the
training step of XGLM 1.7B and of Qwen 3 0.6B (random weights, bfloat16, rows of 2,048 tokens) with
the share of the peak that the model's operations make (MFU), beside PyTorch with fused attention,
compiled, if it finds CUDA; decoding with the share of the memory's bandwidth, and with weights in
int8; requests over eight experts.

Each part runs in a process of its own and is stopped at its time limit, so that a compilation that
hangs costs the others little. The file is written anew after each row, so that a run that is
stopped leaves what it found. Goals and whether they were reached stand at the end. The exit code is
1 if a kernel does not agree with the reference or the comparison did not end, otherwise 0.

Without an accelerator the same parts run at tiny shapes (`--tiny` does that everywhere), which
shows that they run and nothing about speed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


LIMITS = {
    "kernels": 100,
    "train XGLM 1.7B": 150,
    "torch XGLM 1.7B": 120,
    "decode XGLM 1.7B": 100,
    "attention": 60,
    "train Qwen 3 0.6B": 100,
    "torch Qwen 3 0.6B": 100,
    "8 experts of Qwen 3 0.6B": 100,
    "int8 XGLM 1.7B": 100,
    "limits": 40,
    "train XGLM 1.7B without the kernel": 120,
}
"""Part -> seconds that it may take in a run of nine minutes."""
PROGRAM = [sys.executable, __file__]
"""What runs a part, with more arguments."""


class Goal(NamedTuple):
    """What a figure should be at least."""

    name: str
    least: float
    found: Callable[[dict[str, list[Row]]], float | None]
    """Rows of the parts by name -> the figure, or None"""


def _figure(part: str, name: str, **wanted: Any) -> Callable[[dict[str, list[Row]]], float | None]:
    def find(rows: dict[str, list[Row]]) -> float | None:
        for row in rows.get(part, []):
            if row.get(name) is not None and wanted.items() <= row.items():
                return row[name]
        return None

    return find


def _faster_than_torch(model: str) -> Callable[[dict[str, list[Row]]], float | None]:
    ours = _figure(f"train {model}", "tokens_a_second")
    theirs = _figure(f"torch {model}", "tokens_a_second")

    def find(rows: dict[str, list[Row]]) -> float | None:
        both = ours(rows), theirs(rows)
        return None if both[0] is None or both[1] is None else both[0] / both[1]

    return find


GOALS = (
    Goal("MFU of XGLM 1.7B", 0.55, _figure("train XGLM 1.7B", "mfu")),
    Goal("speed of XGLM 1.7B over torch", 1.0, _faster_than_torch("XGLM 1.7B")),
    Goal("speed of Qwen 3 0.6B over torch", 1.0, _faster_than_torch("Qwen 3 0.6B")),
    Goal(
        "share of bandwidth, decoding one request",
        0.7,
        _figure("decode XGLM 1.7B", "bandwidth_share", case="engine", requests=1),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", help="names, comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the figures")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see whether it runs")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return _run_part(options.part, options.tiny)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part that runs, too
    names = options.parts.split(",") if options.parts else list(LIMITS)
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    found = _measure(names, options)
    print("\n" + table("goals", found["goals"]))
    print(f"\n{options.out} has all figures")
    sys.exit(int("kernels" in names and not kernels_agree(found)))


def _measure(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All that is written to the file."""
    ends = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"minutes": options.minutes, "parts": [], "goals": []}

    def write() -> None:
        found["goals"] = goals(found)
        partial = options.out.with_name(f".{options.out.name}.partial")
        partial.write_text(json.dumps(found, indent=1))
        partial.replace(options.out)

    for name in names:
        limit = min(LIMITS[name] * options.minutes / 9, ends - time.monotonic())
        result: dict[str, Any] = {"part": name, "status": "no time left", "rows": []}
        found["parts"].append(result)
        if limit > 0:
            print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            _run_limited(name, options.tiny, limit, result, write)
            print("\n" + table(name, result["rows"]), flush=True)
        print(f"{name}: {result['status']}", flush=True)
        write()
    return found


def _run_limited(
    name: str, tiny: bool, limit: float, result: dict[str, Any], write: Callable[[], None]
) -> None:
    """Runs a part in a process of its own, for so many seconds at most, and fills in its result."""
    begun = time.monotonic()
    result |= {"status": "running", "limit_seconds": limit}
    command = [*PROGRAM, "--part", name, *(["--tiny"] if tiny else [])]
    # A group of its own, with the compilers that it starts.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    cut = threading.Event()

    def stop() -> None:
        cut.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            kind, row = json.loads(line)
            if kind == "row":
                result["rows"].append(row)
            else:
                result[kind] = row
            write()
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = "done" if code == 0 else "failed"
    if cut.is_set():
        status = f"stopped at its limit of {limit:.0f} s"
    result |= {"status": status, "seconds": time.monotonic() - begun}


def _run_part(name: str, tiny: bool) -> None:
    """Runs a part in this process; each line of the output is a kind and what there is of it."""
    with open(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def tell(kind: str, what: Any) -> None:
            print(json.dumps([kind, what]), file=answers, flush=True)

        try:
            from xelm.process import prepare

            prepare()
            import gpu_parts

            sizes = gpu_parts.sizes(tiny)
            tell("machine", gpu_parts.machine())
            tell("tiny", sizes is gpu_parts.TINY)
            for row in gpu_parts.RUN[name](sizes):
                tell("row", row)
        except Exception as error:
            tell("error", f"{type(error).__name__}: {error}")
            traceback.print_exc()
            sys.exit(1)


def kernels_agree(found: dict[str, Any]) -> bool:
    """Whether all kernels were compared, and agree with the reference."""
    parts = [part for part in found["parts"] if part["part"] == "kernels"]
    return all(
        part["status"] == "done" and part["rows"] and all(row["agrees"] for row in part["rows"])
        for part in parts
    )


def goals(found: dict[str, Any]) -> list[Row]:
    """The goals, what was found of each, and whether that reaches it; None where there is nothing,
    as without a known peak or at tiny shapes."""
    rows = {part["part"]: part["rows"] for part in found["parts"] if not part.get("tiny")}
    lines = []
    for goal in GOALS:
        value = goal.found(rows)
        reached = None if value is None else value >= goal.least
        lines.append(
            {"goal": goal.name, "at least": goal.least, "found": value, "reached": reached}
        )
    return lines


def table(title: str, rows: list[Row]) -> str:
    """Rows as a table, with a column for each figure that any has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"**{title}**", ""]
    if rows:
        heads = [name.replace("_", " ") for name in columns]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(name, row.get(name)) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if name.endswith("a_second") or abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:.4g}"


if __name__ == "__main__":
    main()
