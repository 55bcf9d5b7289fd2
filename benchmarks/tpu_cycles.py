"""Estimated cycles of a training step on a TPU v5e, by part of the model; no TPU is needed.

    python benchmarks/tpu_cycles.py --form cpu tpu        # with libtpu: pip install xelm[tpu]

libtpu compiles the step that `xelm train` would run, for devices of a slice that need not exist.
The compiled program states how many cycles the compiler expects each instruction to take. Those of
a loop are multiplied by its trips, and of a choice the branch that takes longer counts. Model FLOP
utilisation (MFU) is the operations of the model (`xelm/training/flops.py`) over those that the
matrix units could compute in these cycles. The estimate knows nothing of the host.

Of a kernel of ours the compiled program states nothing. It is taken to need one cycle for each of
its instruction bundles, which libtpu writes to a file, at each block that it computes.

`--form cpu` compiles the step in the form that it has on CPUs, for comparison: chunks of the loss
that fit their caches, and attention without a fused kernel.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memory
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from xelm.models.config import ModelConfig
from xelm.models.families import model_config
from xelm.models.fused_attention import fused_attention, on_one_device, tpu_kernel
from xelm.models.target import CPU, target_of
from xelm.settings import vary
from xelm.training.flops import of_a_token
from xelm.training.sharding import AXES
from xelm.training_config import RuntimeConfig, TrainConfig

LENGTH = 2048
SLICE = "v5e:2x2"
OPERATIONS_A_CYCLE = 4 * 128 * 128 * 2
"""Of a v5e, whose four matrix units multiply and add 128 x 128 values each: 197 TFLOP/s at 1.5
GHz."""


@dataclass(frozen=True)
class Case:
    """A training whose step is compiled."""

    devices: int
    """Devices that share the parameters (`mesh_fsdp`)."""
    rows: int
    """Rows of `LENGTH` tokens on each device."""
    rematerialise: bool


BFLOAT16 = {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"}
CASES = {
    "XGLM 564M": Case(1, 8, True),
    "Qwen 3 0.6B": Case(1, 8, True),
    "XGLM 1.7B": Case(4, 8, True),
}
"""Name in `memory.CONFIGS` -> a training that fits chips of 16 GB."""
PARTS = ("products", "attention", "loss", "optimiser", "rest")
_SCOPES = {
    **{"loss": "loss", "optimizer": "optimiser", "feedforward": "products"},
    "attention": "attention",
}
"""Named scope -> part. Products of queries, keys, values and results belong to `attention`."""
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, help="of 2,048 tokens on each device")
    parser.add_argument("--form", nargs="*", choices=("cpu", "tpu"), default=["tpu"])
    parser.add_argument("--text", metavar="FILE", help="the compiled program is written here too")
    parser.add_argument("--kernel", choices=CASES, help="only compiles that of a model's attention")
    options = parser.parse_args()
    memory.prepare_devices()
    if options.kernel:
        _compile_kernel(model_config(memory.CONFIGS[options.kernel]))
        return
    print(f"| M cycles | form | rows | {' | '.join(PARTS)} | all | GB | MFU |")
    print("|---|---|---|" + "---|" * (len(PARTS) + 3))
    for name in options.models:
        for form in options.form:
            print(_line(name, form, options.rows, options.text), flush=True)


def _line(name: str, form: str, rows: int | None, file: str | None) -> str:
    model, case = model_config(memory.CONFIGS[name]), CASES[name]
    rows = rows or case.rows
    config = TrainConfig(
        tokens=LENGTH,
        sequence_length=LENGTH,
        batch_size=case.devices * rows,
        runtime=RuntimeConfig(rematerialise=case.rematerialise),
    )
    config = vary(config, BFLOAT16)
    chips = memory.devices_of(case.devices, SLICE)
    shape = (1, 1, case.devices, 1)
    mesh = Mesh(np.asarray(chips).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4)
    target = CPU if form == "cpu" else None
    compiled = memory.compiled_step(model, config, mesh, target)
    if compiled is None:
        return f"| {name} | {form} | {rows} |" + " - |" * (len(PARTS) + 3)
    text = compiled.as_text() or ""
    if file is not None:
        with open(file, "w", encoding="utf-8") as out:
            out.write(text)
    found = by_part(cycles(text, {} if form == "cpu" else _kernels(name, model, rows)))
    total = sum(found.values())
    operations = of_a_token(model, LENGTH) * LENGTH * rows
    share = operations / (total * OPERATIONS_A_CYCLE)
    used: Any = compiled.memory_analysis()
    cells = [f"{found[part] / 1e6:.1f}" for part in PARTS]
    return (
        f"| {name} | {form} | {rows} | {' | '.join(cells)} | {total / 1e6:.1f} | "
        f"{used.peak_memory_in_bytes / 1e9:.1f} | {share:.0%} |"
    )


def by_part(operations: Counter[str]) -> Counter[str]:
    """Cycles of each of `PARTS`, from those of operations by their names."""
    found: Counter[str] = Counter()
    for name, count in operations.items():
        scopes = re.split(r"[/()]", name)
        found[next((part for scope, part in _SCOPES.items() if scope in scopes), "rest")] += count
    return found


def _kernels(name: str, model: ModelConfig, rows: int) -> dict[str, int]:
    """Cycles of each call of the attention's kernels, by their names."""
    wide = tpu_kernel(model).width
    length_in_blocks = LENGTH // 512
    pairs = length_in_blocks * (length_in_blocks + 1) // 2  # that a causal layer computes
    steps = rows * pairs * model.head_count * model.head_size // wide
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # What libtpu is told when it is loaded: it writes its programs as it compiles them.
        told = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--kernel", name],
            env={**os.environ, "LIBTPU_INIT_ARGS": told, "JAX_ENABLE_COMPILATION_CACHE": "false"},
            check=True,
        )
        for kernel in ("attention_forward", "attention_backward"):
            (file,) = Path(folder).glob(f"*{kernel}*schedule-analysis_final_bundles.txt")
            bundles = re.search(r"total scheduled bundles:\s+(\d+)", file.read_text())
            assert bundles is not None
            found[kernel] = steps * int(bundles[1])
    return found


def _compile_kernel(model: ModelConfig) -> None:
    (chip,) = memory.devices_of(1, SLICE)
    heads = [model.head_count, model.key_head_count, model.key_head_count]
    place = SingleDeviceSharding(chip)
    arrays = [
        jax.ShapeDtypeStruct((1, LENGTH, count, model.head_size), jnp.bfloat16, sharding=place)
        for count in heads
    ]
    segments = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=place)

    def attend(query, key, value, segments):
        fused = fused_attention(
            model, target_of([chip]), query.dtype, segments, spread=on_one_device
        )
        assert fused is not None
        return fused(query, key, value, jnp.asarray(False)).sum()

    jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(*arrays, segments).compile()


def cycles(program: str, kernels: Mapping[str, int]) -> Counter[str]:
    """Estimated cycles of the operations in the text of a compiled program, by their names: the
    scopes and the operation, as in "jit(step)/layer/attention/dot_general". kernels: cycles of a
    call of each custom kernel, by a part of its name. Raises ValueError for others."""
    computations, entry = parsed(program)

    def of(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in computations[name]:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                trips = trip_count(line, computations[loop[1]])
                found.update({o: n * trips for o, n in of(loop[2]).items()})
            elif ways := re.search(r"branch_computations=\{([^}]*)\}", line):
                branches = [of(way.strip(" %")) for way in ways[1].split(",")]
                found.update(max(branches, key=lambda branch: branch.total()))
            elif called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                found.update(of(called[1]))
            elif 'custom_call_target="tpu_custom_call"' in line:
                operation = _name(line)
                known = [count for kernel, count in kernels.items() if kernel in operation]
                if not known:
                    raise ValueError(f"nobody knows the cycles of the kernel {operation}")
                found[operation] += known[0]
            elif estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                found[_name(line)] += int(estimate[1])
        return found

    return of(entry)


def _name(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def parsed(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the first that runs."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in program.splitlines():
        if begun := _COMPUTATION.match(line):
            name = begun[2]
            found[name] = []
            entry = name if begun[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def trip_count(loop: str, condition: list[str]) -> int:
    """How often a loop runs: what the compiler knows of it, or the number that it counts to."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    counts = [int(n) for line in condition for n in re.findall(r"constant\((\d+)\)", line)]
    return max(counts, default=1)


if __name__ == "__main__":
    main()
