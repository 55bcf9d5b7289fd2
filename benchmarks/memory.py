"""Memory that training takes, by model, settings and number of devices; nothing is allocated.

    python benchmarks/memory.py --settings float32
    python benchmarks/memory.py --tpu v5e:4x4 --devices 16        # with libtpu, and no TPU

The step that `xelm train` would run is compiled for devices that need not exist, and the compiler
reports its memory: its arguments (parameters and the optimiser's averages) and what it needs
besides (gradients and activations). A device has one row of 2,048 tokens (an encoder's longest row)
with `rematerialise`; several devices share all arrays (`mesh_fsdp`). A dash is a step that does not
fit into the memory of a TPU. Compiled for CPUs, products in bfloat16 take more memory than
elsewhere, since CPUs compute them in float32.
"""

import argparse
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from xelm.data.masking import masked_per_row
from xelm.models.config import ModelConfig
from xelm.models.families import model_config
from xelm.models.target import Target
from xelm.settings import vary
from xelm.training.compiled import compile_steps
from xelm.training.sharding import AXES
from xelm.training_config import RuntimeConfig, TrainConfig

LENGTH = 2048
SMALL = {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"}
SETTINGS = {
    "float32": {},
    "bfloat16": {"runtime.dtype": "bfloat16"},
    "averages too": SMALL,
    "adafactor": {**SMALL, "optimizer.name": "adafactor"},
    "pull": {"optimizer.pull": 10.0},
    "middle frozen": {"frozen_layers": "middle"},
    "lora 64": {"lora.rank": 64},
    "lora 16": {"lora.rank": 16},
    "lora 4": {"lora.rank": 4},
    "lora 16, bfloat16": {"lora.rank": 16, **SMALL},
}
"""Name -> settings of `TrainConfig`; the first four each take less than the one before."""
# As in the config.json of each.
CONFIGS = {
    "XLM-R base": {
        **{"model_type": "xlm-roberta", "vocab_size": 250_002, "hidden_size": 768},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        # Its own 512 rather than the length of the others.
        **{"max_position_embeddings": 514, "type_vocab_size": 1},
    },
    "Gemma 3 270M": {
        **{"model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640},
        **{"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"intermediate_size": 2048, "head_dim": 256, "sliding_window": 512},
        "max_position_embeddings": 32_768,
    },
    "XGLM 564M": {
        **{"model_type": "xglm", "vocab_size": 256_008, "d_model": 1024},
        **{"num_layers": 24, "attention_heads": 16, "ffn_dim": 4096},
    },
    "Qwen 3 0.6B": {
        **{"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"intermediate_size": 3072, "head_dim": 128, "max_position_embeddings": 40_960},
        "tie_word_embeddings": True,
    },
    "XGLM 1.7B": {
        **{"model_type": "xglm", "vocab_size": 256_008, "d_model": 2048},
        **{"num_layers": 24, "attention_heads": 16, "ffn_dim": 8192},
    },
    "EuroLLM 1.7B": {
        **{"model_type": "llama", "vocab_size": 128_000, "hidden_size": 2048},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"intermediate_size": 5632, "max_position_embeddings": 4096},
    },
    "Mistral 7B": {
        **{"model_type": "mistral", "vocab_size": 32_768, "hidden_size": 4096},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"intermediate_size": 14_336, "max_position_embeddings": 32_768},
        "sliding_window": None,
    },
    "XGLM 7.5B": {
        **{"model_type": "xglm", "vocab_size": 256_008, "d_model": 4096},
        **{"num_layers": 32, "attention_heads": 32, "ffn_dim": 16_384},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS)[:4])
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--tpu", metavar="SLICE", help="such as v5e:4x4; needs xelm[tpu]")
    options = parser.parse_args()
    prepare_devices()
    columns = [(count, name) for count in options.devices for name in options.settings]
    heads = [f"{name}, {f'each of {count}' if count > 1 else 'one'}" for count, name in columns]
    print(f"| GB | parameters | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * len(columns))
    for title in options.models:
        model = model_config(CONFIGS[title])
        cells = [
            _cell(model, devices_of(count, options.tpu), SETTINGS[name]) for count, name in columns
        ]
        print(
            f"| {title} | {model.parameter_count / 1e6:,.0f} M | {' | '.join(cells)} |", flush=True
        )


def prepare_devices() -> None:
    """Eight devices of a CPU, and no other; and libtpu's settings on machines without a TPU."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def devices_of(count: int, tpu: str | None) -> list:
    """The first devices of a slice of TPUs that need not exist, such as "v5e:4x4", or of CPUs."""
    if tpu is None:
        return jax.devices()[:count]
    return topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices[:count]


def _cell(model: ModelConfig, devices: list, settings: dict) -> str:
    """GB that one device holds at most during a step; a dash if that is more than it has."""
    length, count = min(LENGTH, model.max_length), len(devices)
    config = TrainConfig(
        tokens=length,
        sequence_length=length,
        batch_size=count,
        runtime=RuntimeConfig(rematerialise=True),
    )
    config = vary(config, settings)
    mesh = Mesh(np.asarray(devices).reshape(1, 1, count, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    used = step_bytes(model, config, mesh)
    return "-" if used is None else f"{used / 1e9:.1f}"


def step_bytes(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> int | None:
    """Bytes that one device holds at most during a training step, by the compiler's account; None
    if that is more than the device has. Nothing is allocated."""
    compiled = compiled_step(model, config, mesh)
    if compiled is None:
        return None
    used: Any = compiled.memory_analysis()
    if mesh.devices.flat[0].platform == "tpu":
        return used.peak_memory_in_bytes
    # On CPUs the peak is of what is given alone.
    given = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return given + used.temp_size_in_bytes


def compiled_step(
    model: ModelConfig, config: TrainConfig, mesh: Mesh, target: Target | None = None
) -> jax.stages.Compiled | None:
    """A compiled training step, in the form for `target` or that of the mesh; None if it needs more
    memory than a device has. Nothing is allocated."""
    functions = compile_steps(model, config, mesh, target)
    length = config.sequence_length
    columns = length + 1 if model.causal else length
    arrays = dict.fromkeys(("tokens", "segments", "positions"), (columns, jnp.int32))
    if not model.causal:
        hidden = masked_per_row(length, config.data.mask_share)
        arrays |= {"inputs": (columns, jnp.int32)}
        arrays |= {"places": (hidden, jnp.int32), "chosen": (hidden, bool)}
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, size), dtype, sharding=functions.batch_sharding
        )
        for name, (size, dtype) in arrays.items()
    }
    rates = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        with jax.set_mesh(mesh):
            return functions.step.lower(functions.state, batch, rates).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


if __name__ == "__main__":
    main()
