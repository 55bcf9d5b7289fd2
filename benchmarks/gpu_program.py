"""What XLA compiles for an H100, without one: kernels of a step, memory and copies.

    python benchmarks/gpu_program.py       # without a GPU: pip install xelm[cuda13]

The training step that `xelm train` would run, and a decoding step, are compiled for a GPU that need
not exist. The compiled program tells what it launches (what is in a loop counts by its trips, and
of a choice all branches), which arrays it copies, its calls of cuDNN's attention, and the memory
beside its arguments. It tells no time: nothing was tried out, as XLA does on a GPU to choose
between kernels. See `benchmarks/gpu.py` for that.
"""

import argparse
import functools
import math
import os
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import memory
import numpy as np
import tpu_cycles
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from xelm.models.cache import empty_cache
from xelm.models.config import ModelConfig
from xelm.models.families import model_config
from xelm.models.parameters import bind, for_inference, inference_graph, shapes
from xelm.models.target import GIB, Target
from xelm.training.sharding import AXES
from xelm.training_config import RuntimeConfig, TrainConfig

TARGET = Target("gpu", 64 * GIB)
# What XLA asks a device for, of an H100 SXM.
DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_LAUNCHED = ("fusion", "custom-call", "copy", "copy-start", "sort", "scatter", "all-reduce")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=memory.CONFIGS, default=["XGLM 1.7B"])
    parser.add_argument("--layers", type=int, help="of each model (default: its own)")
    parser.add_argument("--rows", type=int, default=8, help="of 2,048 tokens, in training")
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 32], help="in decoding")
    parser.add_argument("--text", metavar="FILE", help="the last compiled program is written here")
    options = parser.parse_args()
    device = prepare_device()
    print("| program | kernels | cuDNN | copied, GB | arguments, GB | besides, GB |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        model = model_config(memory.CONFIGS[name])
        model = replace(model, layer_count=options.layers or model.layer_count)
        make = functools.partial(training, model, options.rows, device)
        programs = {f"training, {options.rows} rows": make}
        for requests in options.requests:
            make = functools.partial(decoding, model, requests, device)
            programs[f"decoding, {requests} requests"] = make
        for title, make in programs.items():
            compiled = make()
            text = compiled.as_text() or ""
            found, used = launched(text), compiled.memory_analysis()
            given, besides = (
                n / 1e9 for n in (used.argument_size_in_bytes, used.temp_size_in_bytes)
            )
            print(
                f"| {name}, {title} | {found['kernels']:,} | {found['cudnn']} "
                f"| {found['copied'] / 1e9:.2f} | {given:.2f} | {besides:.2f} |",
                flush=True,
            )
            if options.text:
                with open(options.text, "w", encoding="utf-8") as file:
                    file.write(text)


def prepare_device() -> Any:
    """A GPU to compile for. No device of this machine is used but the CPU."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"  # nothing can be tried out
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="H100", topology="1x1x1", target_config=DEVICE
    )
    return found.devices[0]


def training(model: ModelConfig, rows: int, device: Any) -> Any:
    """The compiled training step in bfloat16."""
    length = min(memory.LENGTH, model.max_length)
    config = TrainConfig(
        tokens=length * rows,
        sequence_length=length,
        batch_size=rows,
        runtime=RuntimeConfig(dtype="bfloat16"),
    )
    shape = np.asarray([device]).reshape(1, 1, 1, 1)
    mesh = Mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
    return memory.compiled_step(model, config, mesh, TARGET)


def decoding(model: ModelConfig, requests: int, device: Any, slots: int = 1024) -> Any:
    """A compiled step that reads a token of each request, in bfloat16."""
    network = inference_graph(model, "bfloat16", target=TARGET)
    place = SingleDeviceSharding(device)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(parameters, tokens, counts, cache):
        whole = bind(network, parameters)
        hidden, longer = whole.extend(tokens, counts, cache)
        return whole.logits(hidden[:, 0]), longer

    def halved(parameters):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), for_inference(parameters))

    ids = jax.ShapeDtypeStruct((requests, 1), jnp.int32)
    counts = jax.ShapeDtypeStruct((requests,), jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(model, requests, slots, "bfloat16"))
    arguments = jax.eval_shape(halved, shapes(model)), ids, counts, cache
    arguments = jax.tree.map(lambda a: a.update(sharding=place), arguments)
    return step.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def launched(program: str) -> Counter[str]:
    """What the text of a compiled program launches: `kernels`, among them calls of `cudnn`, and
    bytes that are `copied`."""
    computations, entry = tpu_cycles.parsed(program)

    @functools.cache
    def of(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in computations[name]:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                trips = tpu_cycles.trip_count(line, computations[loop[1]])
                found.update({key: n * trips for key, n in of(loop[2]).items()})
            elif " conditional(" in line or " call(" in line:
                names = r"(?:true_computation|false_computation|to_apply)=%?([\w.\-]+)"
                several = re.search(r"branch_computations=\{([^}]*)\}", line)
                ways = several[1].split(",") if several else re.findall(names, line)
                for way in ways:
                    found.update(of(way.strip(" %")))
            elif made := re.match(r"\s+(?:ROOT )?%\S+ = (.*?) ([a-z][\w\-]*)\(", line):
                if made[2] in _LAUNCHED:
                    found["kernels"] += 1
                found["cudnn"] += "__cudnn$" in line
                found["copied"] += _size(made[1]) if made[2] in ("copy", "copy-start") else 0
        return found

    return of(entry)


def _size(shape: str) -> int:
    """Bytes of the arrays that a type in the text of a program names."""
    arrays = re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape)
    return sum(
        _BYTES.get(dtype, 4) * math.prod(map(int, sizes.split(","))) if sizes else 0
        for dtype, sizes in arrays
    )


if __name__ == "__main__":
    main()
