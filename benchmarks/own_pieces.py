"""How each router reads beginnings of texts where an expert has pieces of its own.

    python benchmarks/own_pieces.py RUN TEXT [--characters 40] [--documents 20]

RUN has at least one expert that was grown with --extend-vocabulary. TEXT is a folder of
<language>.jsonl or .jsonl.gz files, which the RUN has not seen. Of each language that an expert
serves, the first characters of the documents are scored; languages of experts without more pieces
are one group. For each router: nats a text, the share of texts that are read in pieces of an
expert's own, and the mean weight of the expert that serves the language. "given" is that expert
alone.
"""

import argparse
from pathlib import Path

import numpy as np
from unserved import documents_in

from clustering.languages import lookup
from xelm.api import open_run
from xelm.runs.make_router import serving

TOKENS = 100_000
"""Tokens of each language that are searched for documents."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--characters", type=int, default=40, help="of each document")
    parser.add_argument("--documents", type=int, default=20, help="of each language")
    options = parser.parse_args()
    run = open_run(options.run)
    experts = run.registry().published()
    served = serving(experts)
    extended = {tag for one in experts if one.vocabulary for tag in one.languages}
    groups: dict[str, list[tuple[str, str]]] = {tag: [] for tag in [*sorted(extended), "others"]}
    for tag, texts in documents_in(run, Path(options.text), TOKENS).items():
        if (known := lookup(tag, served)) is None:
            continue
        some = [text for text in texts if len(text) >= options.characters]
        group = groups[known if known in extended else "others"]
        group += [(known, text[: options.characters]) for text in some[: options.documents]]
    print("| text | routing | nats | in own pieces | weight of its expert |\n|---|---|---|---|---|")
    for name in ("given", "learned", "detected", "posterior"):
        ensemble = run.ensemble("language" if name == "given" else name)
        for group, some in groups.items():
            texts = [text for _, text in some]
            languages = [tag for tag, _ in some]
            given = languages if name == "given" else [None] * len(texts)
            scores = ensemble.score(texts, given)
            plain = [len(ids) + 1 for ids in ensemble.tokenizer.encode(texts)]
            own = np.mean(scores.tokens != plain)
            right = [
                scores.weights[experts[served[tag]].name][number]
                for number, tag in enumerate(languages)
            ]
            nats, weight = scores.nats.mean(), np.mean(right)
            print(f"| {group} | {name} | {nats:.1f} | {own:.0%} | {weight:.2f} |", flush=True)


if __name__ == "__main__":
    main()
