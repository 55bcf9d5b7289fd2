"""`xelm features`: states of a seed as it reads text in several languages, for `clustering`."""

from collections.abc import Sequence

import numpy as np

from clustering.errors import UserError
from clustering.internal import States
from experts.verify import hash_directory
from xelm.data.contents import contents_in
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.parts import no_documents
from xelm.data.unusable import UnusableRecords
from xelm.inference.states import document_states
from xelm.models.checkpoint import load_parameters, read_config
from xelm.progress import bar
from xelm.runs.run import Run

SEQUENCE_LENGTH = 256
"""Largest number of tokens of a document that are read; a seed that was trained here reads no more
than its rows in training."""


def features(
    run: Run,
    corpus: AnyCorpus | None = None,
    languages: Sequence[str] | None = None,
    *,
    documents: int = 100,
) -> States:
    """States of the first `documents` documents of each language, by the seed.

    corpus: None takes that of the RUN; for `internal.alignment` it has to be parallel, documents of
    one number meaning the same. languages: None takes all of the corpus. All have as many documents
    as the one with fewest. UserError for a corpus without text in one of them.
    """
    if documents < 1:
        raise UserError(f"documents must be at least 1; got {documents}")
    corpus, unusable = Corpus.of(corpus or run.record["corpus"]), UnusableRecords()
    contents = contents_in(corpus, languages)
    tags, tokenizer = tuple(contents.languages or ()), run.tokenizer()
    texts: dict[str, list[str]] = {tag: [] for tag in tags}
    for document in contents.first_documents(tags, documents, unusable):
        texts[document.language].append(document.text)
    ids = {
        tag: [tokenizer.text_format.framed(one).astype(np.int32) for one in tokenizer.encode(found)]
        for tag, found in texts.items()
    }
    if not all(ids.values()):
        raise no_documents([tag for tag, found in ids.items() if not found], unusable)
    if unusable:  # after which documents of one number would not mean the same
        raise UserError(f"every record of {corpus} has to be usable; {unusable}")
    count = min(map(len, ids.values()))
    model, length = read_config(run.seed), min(SEQUENCE_LENGTH, run.context_length())
    parameters = load_parameters(run.seed, model)
    chosen = [one for found in ids.values() for one in found[:count]]
    total = sum(min(len(one), length) for one in chosen)
    with bar(total, "features", "tok") as shown:
        states = document_states(
            model, parameters, chosen, sequence_length=length, progress=shown.update
        )
    made_from = {f"seed/{name}": found for name, found in hash_directory(run.seed).items()}
    made_from["corpus"] = contents.fingerprint(tags)
    values = states.reshape(len(tags), count, *states.shape[1:])
    return States(languages=tags, values=values, made_from=made_from)
