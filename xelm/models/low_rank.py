"""Low-rank differences of any matrices of a checkpoint, embeddings too, for which PEFT has no form
that is exact where the output head is tied to them. Their file is one of ours: PEFT reads none."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, where safetensors looks it up
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clustering.errors import UserError
from xelm.models.peft import Product

LOW_RANK = "low_rank.safetensors"
"""File of factors: of the tensor NAME [rows, columns], NAME.a [rank, columns] and NAME.b [rows,
rank], whose product b @ a is added to the base's."""


def truncated(
    difference: Float[np.ndarray, "M N"], *, rank: int | None = None, energy: float | None = None
) -> Product:
    """The best approximation of a matrix by a product of this rank, b @ a, in the Frobenius norm
    (Eckart and Young 1936), from its singular values s: the error is the root of the sum of the
    squares of those that are left out. FlexMoRE (arXiv 2602.08818) compresses experts so.

    rank: rank at most. energy: in its place, the share of the sum of s^2 that is kept at least.
    Computed in float64; the factors have equal norms, sqrt(s), and the scale is 1."""
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy, and not both")
    u, s, v = np.linalg.svd(np.asarray(difference, np.float64), full_matrices=False)
    noise = s.max(initial=0.0) * np.finfo(np.float64).eps * max(difference.shape)
    most = int(np.count_nonzero(s > noise))
    if energy is not None:
        total = np.cumsum(np.square(s))
        reached = total >= energy * total[-1] * (1 - 1e-12)
        rank = int(np.argmax(reached)) + 1
    kept = min(most, rank or 0)
    root = np.sqrt(s[:kept])
    return Product(a=root[:, None] * v[:kept], b=u[:, :kept] * root, scale=1.0)


def write_low_rank(
    directory: Path, products: Mapping[str, Product], dtype: str, like: Path
) -> None:
    """Writes the factors of tensors, by name, into an existing directory, in a dtype. like: a file
    whose permissions the new one gets."""
    tensors = {}
    for name, each in products.items():
        tensors[f"{name}.a"] = np.ascontiguousarray(each.a * each.scale, np.dtype(dtype))
        tensors[f"{name}.b"] = np.ascontiguousarray(each.b, np.dtype(dtype))
    save_file(tensors, directory / LOW_RANK, {"format": "pt"})
    # The library writes for its user alone, whatever the umask says.
    shutil.copymode(like, directory / LOW_RANK)


def read_low_rank(directory: Path) -> dict[str, Product]:
    """The products of a directory's file of factors by the tensor that they are added to, oriented
    as that is; UserError for a file that is not readable or has no pairs of factors."""
    path = directory / LOW_RANK
    try:
        with safe_open(path, framework="np") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not readable as safetensors: {error}") from error
    products = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in found):
        a, b = found.get(f"{name}.a"), found.get(f"{name}.b")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(f"{path}: {name}.a and {name}.b are no factors of one matrix")
        products[name] = Product(a.astype(np.float32), b.astype(np.float32), 1.0)
    return products
