"""Whether the text of a corpus is in the language that it is said to be in."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np

from clustering.errors import UserError
from clustering.novelty import Novelty
from xelm.data.corpus import Corpus
from xelm.data.store import Store
from xelm.runs.fit import novelty_of, pieces
from xelm.runs.run import Run

DOCUMENTS = 200
"""Number of documents of a language that are looked at."""
_TOKENS = 512
"""Most tokens of a document; more change little."""
WARNED = 0.25
"""Share of the documents that look like another language from which on a warning is given. Of forty
languages of which a RUN knew fifteen, texts in the others were mistaken for a known one by at most
.16 of their documents (Galician for Spanish; .005 of all others), and texts in the known ones were
recognised by .2 (Arabic hymns) to 1 of theirs."""
REFUSED = 0.6
"""The same from which on the text is refused, if it is `NEARLY_ALL` nearer to that language than to
any other: this held for twelve of the fifteen known languages, and for no other; of their first
hundred characters alone, for .44 of the Galician documents."""
NEARLY_ALL = 0.95


def check_language(run: Run, store: Store) -> None:
    """Compares the first documents of a corpus that is to be trained on with the languages that the
    experts serve. A line on stderr says which share of them looks like another language, from
    `WARNED` on; from `REFUSED` on the tokenised text is deleted, with a UserError. Texts in
    languages that no expert serves are not recognised, and nothing is said where too few are served
    to tell."""
    served = {tag for expert in run.registry().published() for tag in expert.languages}
    detector = novelty_of(run, served, keep=False)
    if detector is None:
        return
    for stated, ids in store.languages.items():
        documents = [ids.document(int(number)) for number in ids.order[:DOCUMENTS]]
        found, nearest = recognised(detector, pieces(run), documents)
        del found[stated]
        for other, count in found.most_common(1):
            share = count / len(documents)
            corpus = Corpus.of(store.record["corpus"])
            said = f"{share:.0%} of {corpus} looks like {other}, and should be {stated}"
            if share >= REFUSED and nearest[other] >= NEARLY_ALL * nearest.total():
                shutil.rmtree(store.directory)
                raise UserError(f"{said}: it is not trained on; give text in {stated}")
            if share >= WARNED:
                print(f"warning: {said}", file=sys.stderr)


def recognised(
    detector: Novelty, names: list[str], documents: Iterable[np.ndarray]
) -> tuple[Counter[str], Counter[str]]:
    """Number of documents, given by their ids, that a detector takes for each of its languages, and
    number that are nearest to it, known or not. names: the characters of each id."""
    known = [detector.identifier.languages[column] for column in detector.columns]
    found, nearest = Counter[str](), Counter[str]()
    for document in documents:
        ids = np.asarray(document)[:_TOKENS]
        if len(ids):
            sums = detector.terms("", [names[token] for token in ids.tolist()], ids).sum(axis=0)
            language = known[int(sums[: len(known)].argmax())]
            nearest[language] += 1
            found[language] += not detector.outside(sums[None])[0]
    return found, nearest
