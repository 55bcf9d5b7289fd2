"""Training steps and decoding on a device, for `benchmarks/gpu.py`, with the share of its peak.

There is no share where the data sheet is not known (`xelm.training.flops.PEAKS`)."""

import functools
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import inference
import jax
import numpy as np
import train_step
from flax.traverse_util import unflatten_dict
from gpu_sizes import FULL, Row, Rows, Sizes

from xelm.inference import blocks
from xelm.inference.decoder import Decoder
from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path, for_inference, fresh_parameters
from xelm.models.target import Target, target_of
from xelm.training.flops import of_a_token, peak_of
from xelm.training_config import RuntimeConfig, TrainConfig


def measured_limits(sizes: Sizes) -> Rows:
    """What the device does in one large product, and reading one large matrix."""
    yield {
        "case": "a product of 4,096 x 4,096",
        "flops_a_second": train_step.measured_peak("bfloat16"),
    }
    yield {"case": "a matrix times a vector", "bytes_a_second": inference.read_bandwidth()}


def train(sizes: Sizes, name: str, *, kernel: bool = True) -> Rows:
    """Time of a training step, and the share of the peak. kernel: whether attention is fused."""
    model = sizes.model(name)
    for rows, rematerialise in sizes.rows:
        config = _train_config(sizes, rows, rematerialise)
        try:
            yield _train_row("xelm", model, config, _measure_ours(model, config, sizes, kernel))
            return
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield {"system": "xelm", "rows": rows, "error": "out of memory"}
        jax.clear_caches()


def _train_config(sizes: Sizes, rows: int, rematerialise: bool) -> TrainConfig:
    return TrainConfig(
        tokens=1000 * rows * sizes.length,
        sequence_length=sizes.length,
        batch_size=rows,
        runtime=RuntimeConfig(dtype="bfloat16", mesh_data=1, rematerialise=rematerialise),
    )


def _measure_ours(
    model: ModelConfig, config: TrainConfig, sizes: Sizes, kernel: bool
) -> tuple[float, float, float]:
    batch = train_step.random_batch(config.batch_size, sizes.length, model.vocabulary_size)
    load = functools.partial(fresh_parameters, model, 0)
    # A kind of GPU without the kernel is the same otherwise.
    here = target_of(jax.devices())
    target = here if kernel or here.platform != "gpu" else Target("older gpu", here.memory_bytes)
    step, held = train_step.our_step(model, config, batch, load, target)
    return *_timed(step, sizes), held()


def _timed(step: Callable[[], Any], sizes: Sizes) -> tuple[float, float]:
    """Seconds of a step, of which some follow each other without waiting, and the last loss."""
    for _ in range(sizes.warm_up):
        float(step())
    seconds, loss = [], float("nan")
    for _ in range(3):
        begun = time.perf_counter()
        losses = [step() for _ in range(sizes.steps)]
        loss = float(losses[-1])
        seconds.append((time.perf_counter() - begun) / sizes.steps)
    return statistics.median(seconds), loss


def _train_row(
    system: str, model: ModelConfig, config: TrainConfig, measured: tuple[float, float, float]
) -> Row:
    seconds, loss, held = measured
    tokens = config.batch_size * config.sequence_length
    flops = of_a_token(model, config.sequence_length) * tokens
    known = peak_of(jax.devices()[0].device_kind)
    return {
        "system": system,
        "rows": config.batch_size,
        "rematerialise": config.runtime.rematerialise,
        "seconds": seconds,
        "tokens_a_second": tokens / seconds,
        "flops": flops,
        "peak_flops": known and known.flops,
        "mfu": known and flops / seconds / known.flops,
        "memory_bytes": held,
        "loss": loss,
    }


def train_torch(sizes: Sizes, name: str) -> Rows:
    """The same step by PyTorch, compiled, with its fused attention."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        yield {"skipped": f"PyTorch is not there to compare with: {error}"}
        return
    if not torch.cuda.is_available() and sizes is FULL:
        yield {"skipped": f"PyTorch {torch.__version__} finds no CUDA"}
        return
    model = sizes.model(name)
    for rows, _ in sizes.rows:
        row = None
        try:
            row = _train_row("torch.compile", model, *_measure_torch(model, rows, sizes))
        except torch.OutOfMemoryError:
            yield {"system": "torch.compile", "rows": rows, "error": "out of memory"}
        if row is not None:
            yield {**row, "torch": torch.__version__}
            return
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _measure_torch(
    model: ModelConfig, rows: int, sizes: Sizes
) -> tuple[TrainConfig, tuple[float, float, float]]:
    import torch
    import transformers

    config = _train_config(sizes, rows, False)
    batch = train_step.random_batch(rows, sizes.length, model.vocabulary_size)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network: Any = transformers.AutoModelForCausalLM.from_config(
            _torch_config(model), attn_implementation="sdpa", dtype=torch.float32
        )
    step, held = train_step.torch_step(network, config, batch, compiled=True)
    return config, (*_timed(step, sizes), held())


def _torch_config(model: ModelConfig) -> Any:
    """A model of transformers with as many operations. Its XGLM has no fused attention: OPT is the
    same but for positions that are learned."""
    import transformers

    if model.positions == "sinusoidal":
        return transformers.OPTConfig(
            vocab_size=model.vocabulary_size,
            hidden_size=model.width,
            word_embed_proj_dim=model.width,
            ffn_dim=model.feedforward_width,
            num_hidden_layers=model.layer_count,
            num_attention_heads=model.head_count,
            max_position_embeddings=model.max_length,
            activation_function="gelu",
            dropout=0.0,
        )
    return transformers.Qwen3Config(
        vocab_size=model.vocabulary_size,
        hidden_size=model.width,
        intermediate_size=model.feedforward_width,
        num_hidden_layers=model.layer_count,
        num_attention_heads=model.head_count,
        num_key_value_heads=model.key_head_count,
        head_dim=model.head_size,
        max_position_embeddings=model.max_length,
        tie_word_embeddings=model.tie_embeddings,
    )


def decode_int8(sizes: Sizes, name: str) -> Rows:
    """The same as `decode` with weights in int8, where this version has them."""
    if importlib.util.find_spec("xelm.models.narrow") is None:
        yield {"skipped": "this version has no weights in int8"}
        return
    yield from decode(sizes, name, dtype="int8")


def decode(sizes: Sizes, name: str, experts: int = 1, dtype: str = "bfloat16") -> Rows:
    """Time of a decoding step of the engine, greedily, for one request and for 32; with several
    experts, of which each request has one, also over that of a single one."""
    model = sizes.model(name)
    parameters = [_for_inference(model, number, dtype) for number in range(experts)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters[0]))
    if not model.tie_embeddings:  # of which a token reads one row
        size -= parameters[0]["embedding"].nbytes
    slots = blocks.slots_for(sizes.prompt + sizes.new)
    for requests in (1, 32):
        seconds = {}
        for count in sorted({1, experts}):
            used = min(count, requests)
            rows = used * blocks.capacity(-(-requests // used))
            read = used * size + rows * blocks.row_bytes(model, slots, "bfloat16")
            row = _decode_row(model, sizes, parameters[:count], requests, dtype)
            seconds[count] = row["seconds"]
            yield {**row, **_reading(read, row["seconds"])}
            if count > 1:
                more = row["seconds"] / seconds[1]
                yield {"case": "time over that of one expert", "requests": requests, "ratio": more}
            elif experts == 1:
                alone = _program_seconds(model, parameters[0], sizes, requests, dtype)
                case = {"case": "programs alone", "requests": requests, "seconds": alone}
                yield {**case, **_reading(read, alone)}


def _reading(read: int, seconds: float) -> Row:
    """What bytes that are read in so many seconds are of the bandwidth."""
    known = peak_of(jax.devices()[0].device_kind)
    return {
        "bytes": read,
        "bytes_a_second": read / seconds,
        "peak_bandwidth": known and known.bandwidth,
        "bandwidth_share": known and read / seconds / known.bandwidth,
    }


def _program_seconds(
    model: ModelConfig, parameters: Any, sizes: Sizes, requests: int, dtype: str
) -> float:
    """Seconds of a decoding step of the model alone, where no token is drawn or waited for."""
    decoder = Decoder(model, lambda: parameters, "bfloat16" if dtype == "int8" else dtype)
    length = sizes.prompt + sizes.new
    prompt = list(range(4, 4 + sizes.prompt))
    texts = [decoder.open([4 + n, *prompt], reserved=length) for n in range(requests)]
    decoder.read({text: text.target for text in texts})

    def steps(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            decoder.read({text: [5] for text in texts})
        jax.block_until_ready(texts[0].block.logits)
        return (time.perf_counter() - begun) / count

    steps(1)
    return steps(sizes.new - 3)


def _for_inference(model: ModelConfig, number: int, dtype: str) -> Any:
    """Random parameters in a dtype."""
    parameters = for_inference(fresh_parameters(model, number))
    if dtype != "int8":
        return jax.tree.map(lambda array: array.astype(dtype), parameters)
    narrow = importlib.import_module("xelm.models.narrow")

    def narrowed(part: Any) -> Any:
        arrays = {path: np.asarray(array) for path, array in by_path(part).items()}
        found = {path: narrow.narrowed(path, array, dtype) for path, array in arrays.items()}
        return jax.device_put(unflatten_dict(found, sep="/"))

    layers = parameters.pop("blocks")
    return {**narrowed(parameters), "blocks": tuple(map(narrowed, layers))}


def _decode_row(
    model: ModelConfig, sizes: Sizes, experts: list[Any], requests: int, dtype: str
) -> Row:
    draw = np.random.default_rng(0)
    prompts = draw.integers(4, model.vocabulary_size, (requests, sizes.prompt)).tolist()
    run = functools.partial(inference.run_ours, model, dtype, sizes.new, experts, 1, prompts)
    run()  # compiles
    runs = [run() for _ in range(3)]
    seconds = statistics.median((r["total"] - r["first"]) / (sizes.new - 1) for r in runs)
    return {
        "case": "engine",
        "requests": requests,
        "experts": len(experts),
        "first_token_seconds": statistics.median(r["first"] for r in runs),
        "seconds": seconds,
        "tokens_a_second": requests / seconds,
    }
