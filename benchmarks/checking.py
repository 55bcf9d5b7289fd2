"""What it costs to look at weights before they are used, against loading them.

    python benchmarks/checking.py

A checkpoint of random weights is written in a folder that goes again. Its file is in the page cache
for all of the rows, so none of them is of the disk. The state of a training is hashed as its files
and, with fingerprints, where it lies.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax

from clustering.files import sha256
from xelm.models.checkpoint import read_for_inference, write_checkpoint
from xelm.models.config import ModelConfig
from xelm.models.parameters import fresh_parameters
from xelm.models.weights import tensor_without_numbers
from xelm.training.fingerprint import fingerprints
from xelm.training.sharding import make_mesh, parameter_shardings
from xelm.training_config import RuntimeConfig, TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024, help="of a decoder of 16 layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    width = options.width
    model = ModelConfig(
        **{"vocabulary_size": 32 * width, "width": width, "feedforward_width": 4 * width},
        **{"layer_count": 16, "head_count": 8, "key_head_count": 8, "head_size": width // 8},
        max_length=1024,
    )
    mesh = make_mesh(TrainConfig(tokens=1, runtime=RuntimeConfig(mesh_data=1)))
    parameters = fresh_parameters(model, 0, parameter_shardings(model, mesh))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_checkpoint(path, model, parameters, model_type="llama", dtype=options.dtype)
        file = path / "model.safetensors"
        size = file.stat().st_size
        times = {
            "loading in float32": _seconds(lambda: read_for_inference(path, model)),
            "looking for NaN and infinity": _seconds(lambda: tensor_without_numbers(file)),
            "SHA-256 of the file": _seconds(lambda: sha256(file)),
        }
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    times["fingerprints of the float32 parameters"] = _seconds(lambda: fingerprints(parameters))
    first = times["loading in float32"]
    print(f"{size / 1e9:.2f} GB in {options.dtype}; {state / 1e9:.2f} GB in float32\n")
    print("| | s | of loading |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.2f} | {seconds / first:.2f} |")


def _seconds(what) -> float:
    """The best of three, after one that compiles and fills the page cache."""
    what()
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        what()
        found.append(time.perf_counter() - begun)
    return min(found)


if __name__ == "__main__":
    main()
