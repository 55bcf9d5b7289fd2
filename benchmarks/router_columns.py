"""The learned router with the column of a new expert alone fitted, and with all fitted again.

    python benchmarks/router_columns.py --run RUN [--experts NAME,...]

For each of these experts (default: all grown ones) a router is fitted for the others; then a column
for the expert is fitted beside theirs, which stay the same to the bit, and all are fitted again.
Printed is the share of the beginnings of held-out documents, of 5, 10 and 20 tokens, that have most
weight on the right expert: of those of the new expert, and of those of all others.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from clustering.vectoriser import Vectoriser
from experts.expert import Expert
from xelm.api import Run, open_run
from xelm.commands.options import names
from xelm.inference.routers import Learned
from xelm.runs.columns import added_columns
from xelm.runs.fit import all_columns, examples
from xelm.runs.shares import expert_text

LENGTHS = (5, 10, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", required=True, help="a RUN with published experts")
    parser.add_argument("--experts", type=names, help="experts that are taken for new")
    options = parser.parse_args()
    run = open_run(options.run)
    experts = run.registry().published()
    if len(experts) < 3:
        raise SystemExit(f"a router without one expert needs two others; got {len(experts)} in all")
    chosen = options.experts or [each.name for each in experts if each.cluster is None]
    features, labels = examples(run, experts)
    points, wanted = held_out(run, experts)
    full = all_columns(features, labels)
    print(f"{'new expert':12}{'':8}{'its own text':>14}{'all other text':>16}{'moved by':>10}")
    for name in chosen:
        new = [each.name for each in experts].index(name)
        known = [number for number in range(len(experts)) if number != new]
        old = labels != new
        before = all_columns(features[old], np.searchsorted(known, labels[old]))
        added = added_columns(features, labels, known, *before, len(experts))
        for kind, (weights, bias) in {"added": added, "all": full}.items():
            right = (points @ weights + bias).argmax(axis=1) == wanted
            mine = wanted == new
            # Of the log weights of the others, relative to their mean, at held-out text.
            logits = points @ weights[:, known] + bias[known], points @ before[0] + before[1]
            centred = [each - each.mean(axis=1, keepdims=True) for each in logits]
            moved = np.abs(centred[0] - centred[1]).mean()
            print(
                f"{name:12}{kind:8}{right[mine].mean():>14.1%}{right[~mine].mean():>16.1%}"
                f"{moved:>10.3f}"
            )


def held_out(run: Run, experts: Sequence[Expert]) -> tuple[np.ndarray, np.ndarray]:
    """Features of beginnings of held-out documents, and the index of the expert of each."""
    vectoriser, states, labels = run.vectoriser(), [], []
    for label, expert in enumerate(experts):
        for source in expert_text(run, expert).held_out:
            for number in np.asarray(source.documents):
                sums = beginnings(vectoriser, source.ids.document(int(number)))
                states.append(sums)
                labels += [label] * len(sums)
    return Learned.features(np.concatenate(states)), np.array(labels)


def beginnings(vectoriser: Vectoriser, document: np.ndarray) -> np.ndarray:
    lengths = [length for length in LENGTHS if length <= len(document)] or [len(document)]
    return np.cumsum(vectoriser.sums(np.split(document, lengths)[:-1]), axis=0)


if __name__ == "__main__":
    main()
