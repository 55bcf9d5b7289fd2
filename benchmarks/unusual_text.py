"""What the default router makes of text in served languages that looks like nobody's.

    python benchmarks/unusual_text.py RUN TEXT [--tokens 4000]

TEXT is a folder of <language>.jsonl or .jsonl.gz files, which the RUN has not seen. The documents
of the languages that experts serve, where their script has capitals, are read as they are, in small
letters, and in capitals; then numbers, drawn at random, and code, the source of this project. For
each kind, bits per byte of the seed, the dense baseline, the expert of the language (for numbers
and code, the best expert of each text), and the default router without and with its mixture; and
the share of tokens at which the router mixes all models.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from unserved import LIMITS, documents_in, or_mixture, scores_of

from clustering.languages import lookup
from xelm.api import Run, open_run
from xelm.inference.route import Walk, mixture
from xelm.inference.routers import MIXTURE
from xelm.runs.make_router import serving

COLUMNS = ("seed", "dense", "expert", "learned, bare", "learned")
CODE = sorted(Path(__file__).parents[1].glob("xelm/inference/*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=4_000, help="of each language")
    options = parser.parse_args()
    run = open_run(options.run)
    experts = run.registry().published()
    served = serving(experts)
    texts = [
        (served[known], text)
        for tag, found in documents_in(run, Path(options.text), options.tokens).items()
        if (known := lookup(tag, served)) is not None
        for text in found
    ]
    cased = [(expert, text) for expert, text in texts if text.lower() != text.upper()]
    draw = np.random.default_rng(0)
    numbers = [" ".join(map(str, draw.integers(0, 10**6, 60))) for _ in range(40)]
    kinds: dict[str, Sequence[tuple[int | None, str]]] = {
        "as it is": cased,
        "small letters": [(expert, text.lower()) for expert, text in cased],
        "capitals": [(expert, text.upper()) for expert, text in cased],
        "numbers": [(None, text) for text in numbers],
        "code": [(None, path.read_text(encoding="utf-8")[:6000]) for path in CODE],
    }
    print(f"| text | {' | '.join(COLUMNS)} | mixed |\n|---|{'---|' * (len(COLUMNS) + 1)}")
    for kind, some in kinds.items():
        print(f"| {kind} | {_row(run, some)} |", flush=True)


def _row(run: Run, texts: Sequence[tuple[int | None, str]]) -> str:
    experts = run.registry().published()
    router = or_mixture(run, experts, "learned")
    ids = [np.asarray(i, np.int64) for i in run.tokenizer().encode([text for _, text in texts])]
    names, targets, scores = scores_of(run, ids)
    total = np.log(2) * sum(len(text.encode()) for _, text in texts)
    own = [
        found[: len(experts)].sum(axis=1).max() if expert is None else found[expert].sum()
        for (expert, _), found in zip(texts, scores)
    ]
    bits = [-sum(found[names.index(name)].sum() for found in scores) / total for name in names[-2:]]
    bits.append(-sum(own) / total)
    mixed = 0
    for one in (router.router, router):
        nats = 0.0
        for document, found in zip(targets, scores):
            own = found[: one.experts]
            weights, by, _ = Walk(one, None, document).decide(own, LIMITS)
            nats -= mixture(weights, own).sum()
            mixed += by.count(MIXTURE)
        bits.append(nats / total)
    share = mixed / sum(map(len, targets))
    return " | ".join([*(f"{value:.3f}" for value in bits), f"{share:.0%}"])


if __name__ == "__main__":
    main()
