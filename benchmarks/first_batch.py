"""How long a training waits for its first batch, by documents of one language.

    python benchmarks/first_batch.py [--documents 1e6,1e7,1e8]

The store is made of documents without words, of 7 or 20 tokens in turn: what is measured depends on
their number alone. Drawing their order is part of tokenising; opening the store and asking for a
batch is what every start of a training does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from clustering.files import write_json
from xelm.data.duplicates import HASH_WORDS
from xelm.data.rows import LanguageShare, batches
from xelm.data.store import FORMAT, open_store, shuffled
from xelm.data.text_format import TextFormat
from xelm.training_config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", default="1e6,1e7,1e8")
    options = parser.parse_args()
    print("| documents | order drawn, s | first batch, s |\n|---|---|---|")
    for text in options.documents.split(","):
        with tempfile.TemporaryDirectory() as folder:
            drawn = _make(Path(folder), int(float(text)))
            print(f"| {int(float(text)):,} | {drawn:.1f} | {_first(folder):.2f} |", flush=True)


def _make(folder: Path, documents: int) -> float:
    """Seconds that drawing the order takes."""
    lengths = np.where(np.arange(documents) % 2, 7, 20)
    began = time.perf_counter()
    order, stream = shuffled("de", lengths)
    seconds = time.perf_counter() - began
    arrays = {"ends": lengths.cumsum(), "bytes": lengths, "order": order, "stream": stream}
    for name, array in arrays.items():
        np.save(folder / f"de.{name}.npy", array)
    tokens = int(lengths.sum())
    for name, size in {"ids": 2 * tokens, "hashes": 8 * HASH_WORDS * documents}.items():
        (folder / f"de.{name}").touch()
        os.truncate(folder / f"de.{name}", size)  # zeros that take no room
    counts = {"documents": documents, "tokens": tokens, "bytes": tokens}
    write_json(
        folder / "store.json", {"format": FORMAT, "dtype": "<u2", "languages": {"de": counts}}
    )
    return seconds


def _first(folder: str) -> float:
    began = time.perf_counter()
    source = LanguageShare(ids=open_store(folder).languages["de"], share=1.0)
    config = TrainConfig(tokens=1000 * 64 * 512, batch_size=64, sequence_length=512)
    next(batches([source], config, TextFormat(start_id=1, end_id=2)))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
