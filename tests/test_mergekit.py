"""Merged values against those of mergekit, on a tiny Llama of random weights."""

import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hub_models import CONFIGS, saved
from safetensors.numpy import load_file, save_file

from experts.merge import Source, merge
from experts.merge_methods import MergeOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models that went from it in directions that have something in common."""
    folder = tmp_path_factory.mktemp("models")
    base = saved(CONFIGS["llama-grouped"], folder / "base").directory
    tensors, draw = load_file(base / "model.safetensors"), np.random.default_rng(0)
    common = {name: draw.normal(size=t.shape) for name, t in tensors.items()}
    found = [base]
    for number in range(3):
        path = folder / f"model-{number}"
        path.mkdir()
        for file in base.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        moved = {
            name: (t + 0.3 * (common[name] + draw.normal(size=t.shape))).astype(np.float32)
            for name, t in tensors.items()
        }
        save_file(moved, path / "model.safetensors", {"format": "pt"})
        found.append(path)
    return found


# Ours, weights, and mergekit's method and parameters.
CASES = {
    "linear": (MergeOptions(), [1, 2, 5], "linear", {}),
    "task-arithmetic": (
        MergeOptions(method="task-arithmetic", scale=0.7),
        [1, -0.5, 2],
        "task_arithmetic",
        {"lambda": 0.7},
    ),
    "ties": (
        MergeOptions(method="ties", density=0.5, scale=0.8),
        [1, 2, 1.5],
        "ties",
        {"density": 0.5, "lambda": 0.8},
    ),
    "slerp": (MergeOptions(method="slerp"), [0.7, 0.3], "slerp", {"t": 0.3}),
    "model-stock": (MergeOptions(method="model-stock"), None, "model_stock", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_mergekit(models, case, tmp_path):
    options, weights, method, parameters = CASES[case]
    base, *others = models
    config = {"merge_method": method, "dtype": "float32", "parameters": parameters}
    if method == "slerp":
        others, base = others[:2], others[0]
    if method != "linear":
        config["base_model"] = str(base)
    numbers = weights if weights and method != "slerp" else [None] * len(others)
    config["models"] = [
        {"model": str(path), **({} if weight is None else {"parameters": {"weight": weight}})}
        for path, weight in zip(others, numbers, strict=True)
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yaml", "theirs"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    ours = merge(
        [Source(path.name, path) for path in others],
        tmp_path / "ours",
        options,
        weights=weights,
        base=Source("base", base) if method not in ("linear", "slerp") else None,
    )
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(ours / "model.safetensors")
    assert found.keys() == wanted.keys()
    start = load_file(base / "model.safetensors")
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(tensor - start[name]).max() > 0.01  # something was merged
