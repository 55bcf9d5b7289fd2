"""Our training step beside PyTorch's, for decoders of one shape.

    python benchmarks/train_step.py [--shapes 4x256x256,8x512x512] [--rounds 7]

Systems: ours, as `xelm train` runs it; and transformers' LlamaForCausalLM with its own attention
(scaled_dot_product_attention) and loss, fused AdamW and clipping of gradients, once eagerly and
once with the model compiled by torch.compile. All have the same parameters to begin with, the same
batches (one document a row), AdamW with the same settings, the same dtype and the same cores. The
losses of their first steps are compared before anything is timed: they must agree within 1e-4 in
float32, 2e-2 in bfloat16.

Each system lives in a process of its own. They take turns, a few steps at a time, in another order
each round; a round's ratio is of times measured next to each other. The peak memory is that of the
process, on a GPU that of the device. Operations of a token are those of
`xelm.training.flops.of_a_token`, and the peak is that of the data sheet; on a CPU, and in float32,
that of one large product of matrices, measured here.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS, EAGER, COMPILED = "xelm", "torch eager", "torch.compile"
SYSTEMS = (OURS, EAGER, COMPILED)
SEED = "seed"
VOCABULARY = 8192
TOKENS = 4096  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--shapes",
        default="4x256x256,4x256x1024,6x384x512,8x512x512",
        help="layers x width x length, comma-separated (default: %(default)s)",
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a system in a round")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--one", choices=(*SYSTEMS, SEED), help=argparse.SUPPRESS)
    parser.add_argument("--seed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one == SEED:
        return _write_seed(options)
    if options.one:
        return _serve(options)
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            command = _command(SEED, shape, options, f"{folder}/seed")
            subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            _compare(shape, options, f"{folder}/seed")


def _command(name: str, shape: str, options: argparse.Namespace, seed: str) -> list[str]:
    command = [sys.executable, __file__, "--one", name, "--shapes", shape, "--seed", seed]
    for option in ("vocabulary", "tokens", "dtype"):
        command += [f"--{option}", str(getattr(options, option))]
    return command


def _compare(shape: str, options: argparse.Namespace, seed: str) -> None:
    systems = options.systems.split(",")
    workers = {name: _Worker(_command(name, shape, options, seed)) for name in systems}
    try:
        losses = {name: worker.ask(1)["loss"] for name, worker in workers.items()}
        tolerance = 1e-4 if options.dtype == "float32" else 2e-2
        if max(losses.values()) - min(losses.values()) > tolerance:
            sys.exit(f"the losses of the first step differ: {losses}")
        for worker in workers.values():
            worker.ask(2)  # what is compiled or laid out on the way
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(options.rounds):
            for name in systems[number % len(systems) :] + systems[: number % len(systems)]:
                seconds[name].append(workers[name].ask(options.steps)["seconds"])
        last = {name: worker.ask(0) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    ours = last[systems[0]]
    flops, peak = ours["flops"], ours["peak"]
    print(f"\n{shape}: {flops / 1e6:,.1f} MFLOP a token; peak {peak / 1e9:,.0f} GFLOP/s")
    print("\n| | tokens/s | time over xelm's | of the peak | memory |")
    print("|---|---|---|---|---|")
    for name in systems:
        rate = options.tokens / statistics.median(seconds[name])
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[systems[0]])]
        print(
            f"| {name} | {rate:,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {rate * flops / peak:.0%} "
            f"| {last[name]['memory'] / 2**20:,.0f} MiB |",
            flush=True,
        )


def _model(layers: int, width: int, length: int, vocabulary: int) -> Any:
    from dataclasses import replace

    from xelm.presets import tiny

    model = tiny().model
    assert model is not None
    return replace(
        model,
        vocabulary_size=vocabulary,
        width=width,
        feedforward_width=width * 8 // 3 // 64 * 64,
        layer_count=layers,
        head_size=64,
        head_count=width // 64,
        key_head_count=width // 64,
        max_length=length,
    )


class _Worker:
    """A system in a process of its own, which runs steps on request."""

    def __init__(self, command: list[str]):
        # The others need memory of the same device.
        apart = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=apart
        )

    def ask(self, steps: int) -> dict[str, float]:
        """Seconds of a step, loss of the first, and memory."""
        assert self._process.stdin and self._process.stdout
        print(steps, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _serve(options: argparse.Namespace) -> None:
    from xelm.process import prepare

    prepare()  # of which torch gains as well, by memory that is kept
    layers, width, length = map(int, options.shapes.split("x"))
    model = _model(layers, width, length, options.vocabulary)
    batch = random_batch(options.tokens // length, length, options.vocabulary)
    with open(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        make = _ours if options.one == OURS else _torch
        step, memory = make(model, batch, options)
        for line in sys.stdin:
            started, losses = time.perf_counter(), []
            for _ in range(int(line)):
                losses.append(step())
            loss = float(losses[0]) if losses else 0.0
            if losses:
                float(losses[-1])  # until it is there
            seconds = (time.perf_counter() - started) / max(1, int(line))
            found = {"seconds": seconds, "loss": loss, "memory": memory()}
            if options.one == OURS and not losses:
                found |= _limits(model, options, length)
            print(json.dumps(found), file=answers, flush=True)


def random_batch(rows: int, length: int, vocabulary: int) -> Any:
    """Random tokens, one more in each row than are read."""
    import numpy as np

    return np.random.default_rng(0).integers(4, vocabulary, (rows, length + 1), np.int32)


def _config(options: argparse.Namespace, length: int) -> Any:
    from xelm.training_config import RuntimeConfig, TrainConfig

    return TrainConfig(
        tokens=options.tokens * 1000,
        sequence_length=length,
        batch_size=options.tokens // length,
        runtime=RuntimeConfig(dtype=options.dtype, mesh_data=1),
    )


def _write_seed(options: argparse.Namespace) -> None:
    from xelm.models.checkpoint import write_checkpoint
    from xelm.models.parameters import fresh_parameters

    layers, width, length = map(int, options.shapes.split("x"))
    model = _model(layers, width, length, options.vocabulary)
    write_checkpoint(Path(options.seed), model, fresh_parameters(model, 0), model_type="llama")


def _ours(model: Any, batch: Any, options: argparse.Namespace) -> tuple[Callable, Callable]:
    import jax

    from xelm.models.checkpoint import load_parameters

    if options.dtype == "float32":  # and no TensorFloat-32, as with torch
        jax.config.update("jax_default_matmul_precision", "highest")
    config = _config(options, batch.shape[1] - 1)
    return our_step(model, config, batch, functools.partial(load_parameters, options.seed, model))


def our_step(
    model: Any, config: Any, batch: Any, parameters: Callable, target: Any = None
) -> tuple[Callable, Callable]:
    """A training step on a batch [rows, tokens + 1], as `xelm train` runs it, which returns the
    loss before the device has it; and the bytes of memory that were in use at most. parameters:
    (shardings) -> those to begin with. target: as in `compile_steps`."""
    import jax
    import numpy as np

    from xelm.training.compiled import compile_steps
    from xelm.training.expert_axis import stack
    from xelm.training.sharding import make_mesh

    mesh = make_mesh(config)
    jax.set_mesh(mesh)
    functions = compile_steps(model, config, mesh, target)
    placed = jax.tree.map(lambda array: array.sharding, functions.alone[0].parameters)
    state = functions.create[0](parameters(placed))
    state = stack([state], functions.state)
    arrays = {
        "tokens": batch,
        "segments": np.ones_like(batch),
        "positions": np.broadcast_to(np.arange(batch.shape[1], dtype=np.int32), batch.shape),
    }
    arrays = jax.device_put(arrays, functions.batch_sharding)
    rates = np.array([1e-3], np.float32)

    def step() -> Any:
        nonlocal state
        state, metrics = functions.step(state, arrays, rates)
        return metrics.loss[0]

    def memory() -> float:
        found = jax.local_devices()[0].memory_stats() or {}
        return found.get("peak_bytes_in_use") or _resident()

    return step, memory


def _torch(model: Any, batch: Any, options: argparse.Namespace) -> tuple[Callable, Callable]:
    import torch
    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.seed, attn_implementation="sdpa", dtype=torch.float32
    )
    config = _config(options, batch.shape[1] - 1)
    return torch_step(network, config, batch, compiled=options.one == COMPILED)


def torch_step(
    network: Any, config: Any, batch: Any, *, compiled: bool
) -> tuple[Callable, Callable]:
    """The same step and memory by PyTorch, for a decoder of transformers in float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    network.to(device)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=1e-8,
        fused=True,
    )
    tokens = torch.tensor(batch[:, :-1], dtype=torch.long, device=device)
    targets = torch.tensor(batch[:, 1:], dtype=torch.long, device=device)
    network.train()

    def loss_of(tokens: Any, targets: Any) -> Any:
        half = config.runtime.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(input_ids=tokens, use_cache=False).logits
        flat = logits.float().reshape(-1, logits.shape[-1])
        return torch.nn.functional.cross_entropy(flat, targets.reshape(-1))

    if compiled:
        loss_of = torch.compile(loss_of)

    def step() -> Any:
        loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def memory() -> float:
        return torch.cuda.max_memory_allocated() if device == "cuda" else _resident()

    return step, memory


def _resident() -> float:
    """Bytes of memory that this process held at most."""
    import resource

    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limits(model: Any, options: argparse.Namespace, length: int) -> dict[str, float]:
    """Operations of a token, and how many a second the device can do."""
    from xelm.training.flops import of_a_token, peak

    return {
        "flops": of_a_token(model, length),
        "peak": peak(options.dtype, 1) or measured_peak(options.dtype),
    }


def measured_peak(dtype: str) -> float:
    """FLOP/s of one large product of matrices, the best of ten."""
    import jax
    import jax.numpy as jnp

    # Of random numbers: GPUs multiply ones at less power, and so faster.
    a = jax.random.normal(jax.random.key(0), (4096, 4096), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best


if __name__ == "__main__":
    main()
