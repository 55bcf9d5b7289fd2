"""Memory that training takes, by model and number of devices; nothing of the models is allocated.

    python benchmarks/memory.py

The step that `xelm train` would run is compiled for devices that are pretended, and its compiler
asked: what it is given (parameters and the two averages of Adam, 12 bytes a parameter) and what it
needs besides (gradients, 4 bytes a parameter, and activations). One row of 2,048 tokens a device,
float32, activations computed again on the way back (`rematerialise`). On several devices the
parameters, averages and gradients are spread over all of them (`mesh_fsdp`).
"""

import argparse
import os

# Before anything imports JAX.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from xelm.config import TrainConfig
from xelm.data.masking import most_hidden
from xelm.models.config import ModelConfig
from xelm.models.families import model_config
from xelm.training.program import program
from xelm.training.sharding import make_mesh

DEVICES = (1, 8)
LENGTH = 2048
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    heads = [f"GB on {'one device' if n == 1 else f'each of {n}'}" for n in DEVICES]
    print(f"| model | parameters | 16 bytes each, GB | {' | '.join(heads)} |")
    print("|---|---|---|" + "---|" * len(DEVICES))
    for name in options.models:
        model = model_config(CONFIGS[name])
        sizes = [f"{_step_bytes(model, devices) / 1e9:.1f}" for devices in DEVICES]
        count = model.parameter_count
        print(f"| {name} | {count / 1e6:,.0f} M | {16 * count / 1e9:.1f} | {' | '.join(sizes)} |")


def _step_bytes(model: ModelConfig, devices: int) -> int:
    """What one device holds at most during a step, by the compiler's account."""
    length = min(LENGTH, model.max_length)
    config = TrainConfig(
        tokens=length,
        sequence_length=length,
        batch_size=devices,
        mesh_data=1,
        mesh_fsdp=devices,
        rematerialise=True,
    )
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        functions = program(model, config, mesh)
        columns = length + 1 if model.causal else length
        arrays = dict.fromkeys(("tokens", "segments", "positions"), (columns, jnp.int32))
        if not model.causal:
            hidden = most_hidden(length, config.mask_share)
            arrays |= {"inputs": (columns, jnp.int32)}
            arrays |= {"places": (hidden, jnp.int32), "chosen": (hidden, bool)}
        batch = {
            name: jax.ShapeDtypeStruct((devices, size), dtype, sharding=functions.batch_sharding)
            for name, (size, dtype) in arrays.items()
        }
        rates = jax.ShapeDtypeStruct((1,), jnp.float32)
        compiled = functions.step.lower(functions.state, batch, rates).compile()
    used = compiled.memory_analysis()
    given = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return given + used.temp_size_in_bytes


if __name__ == "__main__":
    main()
