"""How many documents of each language of a corpus a RUN takes for a language that it knows.

    python benchmarks/language_check.py --run RUN --corpus CORPUS

Prints for each language, known to the RUN or not, the share of its first 200 documents that
`xelm grow` and `xelm train --again` would call text in a known language, and the share that is
nearest to that language; of whole documents, and of their first 100 characters.
"""

import argparse

import numpy as np

from xelm.api import open_run
from xelm.data.contents import contents_in
from xelm.data.unusable import UnusableRecords
from xelm.runs.fit import novelty_of, pieces
from xelm.runs.language import DOCUMENTS, recognised


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", required=True, help="a RUN with published experts")
    parser.add_argument("--corpus", required=True, help="text in its languages and in others")
    options = parser.parse_args()
    run = open_run(options.run)
    served = {tag for expert in run.registry().published() for tag in expert.languages}
    detector = novelty_of(run, served, keep=False)
    if detector is None:
        raise SystemExit(f"{options.run} serves too few languages")
    contents, texts = contents_in(options.corpus), {}
    for document in contents.first_documents(
        contents.languages or (), DOCUMENTS, UnusableRecords()
    ):
        texts.setdefault(document.language, []).append(document.text)
    names, tokenizer = pieces(run), run.tokenizer()
    print(f"{'language':10}{'known':>7}   taken for, nearest to: whole, first 100 characters")
    for tag, some in sorted(texts.items()):
        shown = []
        for length in (None, 100):
            documents = map(np.asarray, tokenizer.encode([text[:length] for text in some]))
            found, nearest = recognised(detector, names, documents)
            other, _ = (found or nearest).most_common(1)[0]
            total = nearest.total()
            shown.append(f"{other} {found[other] / total:.1%}, {nearest[other] / total:.1%}")
        print(f"{tag:10}{'yes' if tag in served else 'no':>7}   {'; '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
