"""Tokenising of a corpus into memory-mapped ids, beside `datasets.map` with as many workers.

    python benchmarks/tokenise.py --run RUN --corpus CORPUS

Both get the same documents from memory and the same tokenizer, in turn, in one run: xelm in threads
of one process and in processes of its own (`xelm init --workers`), datasets in as many processes
with batches of as many documents; writing is counted, starting the processes too. The ids are
compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xelm.data import reading
from xelm.data.parts import Document
from xelm.data.tokenise import BATCH_DOCUMENTS, build_store
from xelm.data.unusable import UnusableRecords
from xelm.process import prepare
from xelm.runs.run import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", required=True, help="a RUN, for its tokenizer")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare()  # as the command line does: threads are allowed
    import datasets  # here, since the processes read this file too

    datasets.disable_progress_bars()
    run = open_run(options.run)
    every = list(reading.read(options.corpus, UnusableRecords()))
    # Evenly over all languages.
    documents = every[:: max(1, len(every) // options.documents)]
    megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
    systems = {
        "xelm, threads of one process": lambda: _ours(run, documents, 1),
        f"xelm, {options.workers} processes": lambda: _ours(run, documents, options.workers),
        f"datasets.map, {options.workers} processes": lambda: _peer(
            run, documents, options.workers
        ),
    }
    seconds, tokens = _timed(systems, options.rounds)
    (count,) = set(tokens.values())
    print(f"{len(documents):,} documents, {megabytes:.1f} MB, {count:,} tokens")
    print("| | MB/s | time over that of the last |\n|---|---|---|")
    last = seconds[next(reversed(seconds))]
    for name, times in seconds.items():
        ratios = sorted(time / other for time, other in zip(times, last))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {megabytes / statistics.median(times):.2f} | {ratio} |")


def _timed(
    systems: dict[str, Callable[[], int]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    tokens = {}
    for _ in range(rounds):
        for name, run in systems.items():
            began = time.perf_counter()
            tokens[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, tokens


def _ours(run, documents: Sequence[Document], workers: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run.tokenizer()
        store = build_store(
            Path(folder) / "store", documents, tokenizer, UnusableRecords(), workers=workers
        )
        return sum(len(ids.ids) for ids in store.languages.values())


def _peer(run, documents: Sequence[Document], workers: int) -> int:
    import datasets

    hub = run.tokenizer().hub

    def encode(batch):
        return hub(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )

    with tempfile.TemporaryDirectory() as folder:
        texts = datasets.Dataset.from_dict({"text": [document.text for document in documents]})
        found = texts.map(
            encode,
            batched=True,
            batch_size=BATCH_DOCUMENTS,
            num_proc=workers,
            remove_columns=["text"],
            load_from_cache_file=False,
            cache_file_name=f"{folder}/ids.arrow",
        )
        lengths = found.data.column("input_ids").combine_chunks().value_lengths()
        return int(np.sum(lengths.to_numpy()))


if __name__ == "__main__":
    main()
