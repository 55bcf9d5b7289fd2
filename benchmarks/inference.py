"""Ensemble inference: experts run together, against one dense model, one by one, transformers and
llama.cpp.

    python benchmarks/inference.py [--shape 8x512] [--experts 1,4,8,16] [--batches 1,32] [--rank R]
        [--llama-cpp float32,float16,int8] [--one-core]

Requests ask for as many new tokens each, greedily, after prompts of one length, and are dealt out
to the experts in turn, as in traffic of mixed languages. Systems: one dense model in our engine;
the ensemble with one, two and all experts for each request; the requests of the first one after the
other, each by its expert; transformers, which has each expert continue its requests in one batch
(LlamaForCausalLM, the same checkpoints); and llama.cpp, with a context for each expert, which
continues the requests of one expert after those of another, at once or ("one slot") one by one.
Where all take the same expert or the largest token of the same one, the tokens are compared, and
must be the same for nine requests in ten (products of another shape round otherwise, and random
models have many equals); those of llama.cpp's 16 and 8 bits are not compared.

llama.cpp needs `pip install 'xelm[gguf]' gguf`, and is left out where that is not installed.

With `--rank`, the experts are LoRA adapters of that rank, of all dense layers of one model: the
systems "merged" have a full copy of the weights for each, and "beside the base" share those of the
base, whose products with the factors are added; their time is over that of the merged ones.
transformers and llama.cpp are left out then.

Ours run in one process and each other library in another, which take turns in every round. The time
of a system over the dense model's is of the same round: median (smallest to largest). A step of
decoding reads the parameters of every expert that runs once: their bytes by the time of a step are
a bandwidth, beside that of a product of a matrix of half a gigabyte with a vector.

With `--one-core`, all run on one core, and times are those of the processor: other programs on the
machine change them little, since waiting does not count.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp_peer
import numpy as np
import transformers_peer
from decoders import decoder

DENSE, ONE_BY_ONE, BESIDE = "dense", "top-1, one by one", "beside the base"
TRANSFORMERS, LLAMA_CPP = "transformers, top-1", "llama.cpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="8x512", help="layers x width (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--experts", default="1,4,8,16")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rank", type=int, help="experts are adapters of this rank")
    parser.add_argument(
        "--llama-cpp",
        default=_installed(),
        metavar="PRECISIONS",
        help=f"of {', '.join(llama_cpp_peer.WEIGHTS)}; empty: without it (default: %(default)s)",
    )
    parser.add_argument("--one-core", action="store_true", help="count its processor time")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precisions = [name for name in options.llama_cpp.split(",") if name]
    options.clock = time.process_time if options.one_core else time.perf_counter
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.peer:
        name, folder = options.peer
        peer = {TRANSFORMERS: transformers_peer, LLAMA_CPP: llama_cpp_peer}[name]
        prompts = partial(_prompts, options)
        return _answer(peer.answerer(options, Path(folder), prompts), peer.memory)
    counts = [int(n) for n in options.experts.split(",")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        _write(options, Path(folder), max(counts))
        names = [] if options.rank else [TRANSFORMERS, *[LLAMA_CPP] * bool(options.precisions)]
        peers = {}
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--peer", name, folder]
            peers[name] = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        _compare(options, Path(folder), counts, peers)
        for peer in peers.values():
            assert peer.stdin is not None
            peer.stdin.close()


def _installed() -> str:
    """The precisions in which llama.cpp is measured if nothing else is said."""
    packages = all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf"))
    return "float32,float16,int8" if packages else ""


def _answer(answer: Callable[..., dict], memory: Callable[[], int]) -> None:
    """Answers questions on stdin, a line of JSON each; an empty one is for the memory at most."""
    for line in sys.stdin:
        question = json.loads(line)
        found = answer(**question) if question else {"memory": memory()}
        # Libraries may print before the answer.
        print("\n" + json.dumps(found), flush=True)


def _write(options: argparse.Namespace, folder: Path, count: int) -> None:
    from xelm.models.checkpoint import write_adapted, write_checkpoint
    from xelm.models.parameters import fresh_parameters

    for number in range(1 if options.rank else count):
        parameters = fresh_parameters(_shape(options), number)
        write_checkpoint(folder / str(number), _shape(options), parameters, model_type="llama")
    for number in range(1, count if options.rank else 0):
        write_adapted(folder / str(number), folder / "0", _adapter(options, number))


def _adapter(options: argparse.Namespace, number: int) -> Any:
    from xelm.models.adapters import Adapter, chosen_targets
    from xelm.models.parameters import by_path, shapes

    draw, factors = np.random.default_rng(number), {}
    for path in chosen_targets("all", _shape(options)):
        layers, inputs, outputs = by_path(shapes(_shape(options)))[f"{path}/weight"].shape
        sizes = (layers, inputs, options.rank), (layers, options.rank, outputs)
        factors[path] = tuple(0.05 * draw.standard_normal(s, np.float32) for s in sizes)
    return Adapter(scale=1.0, factors=factors)


def _shape(options: argparse.Namespace) -> Any:
    return decoder(options.shape, options.vocabulary)


def _prompts(options: argparse.Namespace, batch: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return draw.integers(4, options.vocabulary, (batch, options.prompt)).tolist()


def _compare(
    options: argparse.Namespace, folder: Path, counts: list[int], peers: dict[str, Any]
) -> None:
    import jax

    from xelm.models.checkpoint import read_for_inference
    from xelm.models.shared import overlaid, read_part

    config, dtype = _shape(options), options.dtype
    experts = [
        jax.device_put(read_for_inference(folder / str(n), config, dtype))
        for n in range(max(counts))
    ]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(experts[0]))
    beside, parts = [], []
    for number in range(1, max(counts) if options.rank else 0):
        parts.append(jax.device_put(read_part(folder / str(number), config, dtype)))
        beside.append(overlaid(experts[0], parts[-1]))
    limit = read_bandwidth(options.clock)
    print(
        f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores; decoder "
        f"{options.shape}, {config.parameter_count / 1e6:.0f} M parameters, {dtype}; prompts of "
        f"{options.prompt} tokens, {options.new} new ones; a large matrix times a "
        f"vector reads {limit / 1e9:.1f} GB/s\n"
    )
    print("| requests | experts | system | first token, s | tokens/s | GB/s | time over dense |")
    print("|---|---|---|---|---|---|---|")
    for batch in map(int, options.batches.split(",")):
        prompts = _prompts(options, batch)
        for count in counts:
            systems = _systems(options, experts[:count], prompts, peers)
            if beside and count > 1:
                systems = _of_adapters(options, experts[:count], beside[: count - 1], prompts)
            found = _rounds(systems, options.rounds)
            _check(found)
            for name, runs in found.items():
                read = size * min(batch * _experts_run(name, count), count if name != DENSE else 1)
                if name == ONE_BY_ONE or "one slot" in name:
                    read = size * batch
                if name.startswith(LLAMA_CPP):
                    read *= llama_cpp_peer.bytes_of_a_weight(name) / np.dtype(dtype).itemsize
                # Of adapters, the price of the products: over the same experts, merged.
                other = found.get(name.replace(BESIDE, "merged") if BESIDE in name else DENSE)
                _print(options, name, batch, count, runs, other, read)
    if parts:
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
        print(
            f"\nweights of {max(counts)} experts: {size * len(experts) / 1e9:.2f} GB merged, "
            f"{(size + small) / 1e9:.2f} GB beside the base"
        )
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    held = peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"\nmemory at most, of ours: {held / 1e9:.2f} GB, of which experts "
        f"{size * len(experts) / 1e9:.2f}"
    )
    for name, peer in peers.items():
        print(f"of {name.partition(',')[0]}: {_ask(peer, {})['memory'] / 1e9:.2f} GB")


def _systems(
    options: argparse.Namespace, experts: list, prompts: list, peers: dict[str, Any]
) -> dict[str, Any]:
    """What is timed, by name."""
    count = len(experts)
    found = {DENSE: lambda: _ours(options, experts[:1], 1, prompts)}
    if count > 1:
        found["top-1"] = lambda: _ours(options, experts, 1, prompts)
        found["top-2"] = lambda: _ours(options, experts, 2, prompts)
    if count > 2:
        found["all"] = lambda: _ours(options, experts, count, prompts)
    if count > 1 and len(prompts) > 1:
        found[ONE_BY_ONE] = lambda: _one_by_one(options, experts, prompts)
    question = {"batch": len(prompts), "experts": count}
    for name, peer in peers.items():
        if name == TRANSFORMERS:
            found[name] = partial(_ask, peer, question)
            continue
        for precision in options.precisions:
            own = {**question, "precision": precision}
            found[f"{name} {precision}, top-1"] = partial(_ask, peer, {**own, "slots": "all"})
            if len(prompts) > count:
                found[f"{name} {precision}, one slot"] = partial(
                    _ask, peer, {**own, "slots": "one"}
                )
    return found


def _of_adapters(
    options: argparse.Namespace, merged: list, beside: list, prompts: list
) -> dict[str, Any]:
    """What is timed of adapters, by name; the base is no expert."""
    count = len(beside)
    found = {DENSE: lambda: _ours(options, merged[:1], 1, prompts)}
    for name, experts in (("merged", merged[1:]), (BESIDE, beside)):
        found[f"top-1, {name}"] = lambda experts=experts: _ours(options, experts, 1, prompts)
        found[f"all, {name}"] = lambda experts=experts: _ours(options, experts, count, prompts)
    return found


def _experts_run(name: str, count: int) -> int:
    return {"top-2": 2, "all": count}.get(name.partition(",")[0], 1)


def _rounds(systems: dict[str, Any], rounds: int) -> dict[str, list[dict]]:
    for run in systems.values():
        run()  # compiles
    found: dict[str, list[dict]] = {name: [] for name in systems}
    for number in range(rounds):
        order = list(systems)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            found[name].append(systems[name]())
    return found


def _check(found: dict[str, list[dict]]) -> None:
    """Ends the benchmark unless systems that run the same expert generate the same tokens."""
    if f"top-1, {BESIDE}" in found:
        pair = (found[f"top-1, {name}"][0]["tokens"] for name in ("merged", BESIDE))
        same = np.mean([a == b for a, b in zip(*pair)])
        if same < 0.9:
            sys.exit(f"merged and {BESIDE} agree on {same:.0%} of the requests")
        return
    if "top-1" not in found:
        found = {"top-1": found[DENSE], **found}
    wanted = found["top-1"][0]["tokens"]
    for name in found:
        other = name.startswith(LLAMA_CPP) and f"{LLAMA_CPP} float32" not in name
        if name not in (DENSE, "top-1", "top-2", "all") and not other:
            same = np.mean([a == b for a, b in zip(wanted, found[name][0]["tokens"])])
            if same < 0.9:
                sys.exit(f"{name} and ours agree on {same:.0%} of the requests")


def _print(options, name, batch, count, runs, dense, read) -> None:
    ratios = [run["total"] / other["total"] for run, other in zip(runs, dense)]
    first = statistics.median(run["first"] for run in runs)
    step = statistics.median((run["total"] - run["first"]) / (options.new - 1) for run in runs)
    print(
        f"| {batch} | {count} | {name} | {first:.3f} | {batch / step:.1f} | {read / step / 1e9:.1f}"
        f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
        flush=True,
    )


class Ids:
    """In the place of a tokenizer: nothing ends a text."""

    end_ids = frozenset()

    def starts(self, ids):
        return 1

    def decode(self, ids):
        return "".join(chr(0x100 + int(number)) for number in ids)


class Dealt:
    """A router that gives requests to experts in turn: the n-th to `each` from the n-th on."""

    memory = 1.0

    def __init__(self, experts: int, each: int):
        self.experts, self.each = experts, each

    def start(self, language):
        weights = np.full(self.experts, -np.inf)
        weights[(int(language) + np.arange(self.each)) % self.experts] = -np.log(self.each)
        return weights

    def terms(self, before, ids):
        return np.zeros((len(ids), self.experts))

    def needs_log_likelihoods(self, states):
        return np.zeros(len(states), bool)

    def log_weights(self, states, log_likelihoods):
        return states

    def decided_by(self, states):
        return ["fixed"] * len(states)


def _ours(options: Any, experts: list, each: int, prompts: list, first: int = 0) -> dict:
    about = _shape(options), options.dtype, options.new
    return run_ours(*about, experts, each, prompts, first, options.clock)


def run_ours(
    model: Any,
    dtype: str,
    new: int,
    experts: list,
    each: int,
    prompts: list,
    first: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Continues prompts greedily by `new` tokens, each by `each` of the experts in turn, from the
    one of number `first` on; returns the seconds until the first token, those of all, and the
    tokens."""
    from xelm.inference.ensemble import Ensemble
    from xelm.inference.generation import generate
    from xelm.inference.running import GenerationRequest
    from xelm.inference.sampling_params import SamplingParams

    ensemble = Ensemble(
        names=[str(n) for n in range(len(experts))],
        model=model,
        parameters=experts,
        router=Dealt(len(experts), each),
        tokenizer=Ids(),  # pyright: ignore[reportArgumentType]
        dtype=dtype,
    )
    sampling = SamplingParams(max_new_tokens=new, temperature=0.0)
    emitted: list[float] = []
    begun = clock()
    found = generate(
        ensemble,
        [
            GenerationRequest(ids=prompt, sampling=sampling, language=str(first + n))
            for n, prompt in enumerate(prompts)
        ],
        lambda number, piece: emitted.append(clock()) if not emitted else None,
    )
    total = clock() - begun
    tokens = [list(generation.ids) for generation in found]
    return {"first": emitted[0] - begun, "total": total, "tokens": tokens}


def _one_by_one(options: Any, experts: list, prompts: list) -> dict:
    runs = [_ours(options, experts, 1, [ids], number) for number, ids in enumerate(prompts)]
    return {
        "first": sum(run["first"] for run in runs),
        "total": sum(run["total"] for run in runs),
        "tokens": [run["tokens"][0] for run in runs],
    }


def read_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second at which a large matrix is read for its product with a vector."""
    import jax
    import jax.numpy as jnp

    array, vector = jnp.ones((2**15, 2**12), jnp.float32), jnp.ones(2**12)
    read = jax.jit(lambda array, vector: array @ vector)
    read(array, vector).block_until_ready()
    best = float("inf")
    for _ in range(5):
        begun = clock()
        read(array, vector).block_until_ready()
        best = min(best, clock() - begun)
    return array.nbytes / best


def _ask(peer: subprocess.Popen, question: dict) -> dict:
    assert peer.stdin is not None and peer.stdout is not None
    print(json.dumps(question), file=peer.stdin, flush=True)
    while line := peer.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    sys.exit("another library's process ended early")


if __name__ == "__main__":
    main()
