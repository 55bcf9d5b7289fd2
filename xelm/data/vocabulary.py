"""The vocabulary of a model that has more pieces than the seed: the seed's ids, which keep their
meaning, and behind them ids of pieces of its own."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from clustering.errors import UserError
from clustering.files import sha256
from xelm.config import StartToken
from xelm.data import tokenizer as tokenizers
from xelm.data.store import TokenizedLanguage, open_store
from xelm.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Vocabulary:
    """The pieces of an extended tokenizer, and what each new one is in ids of the seed."""

    tokenizer: Tokenizer
    """The extended tokenizer."""
    base: Tokenizer
    """The seed's tokenizer."""
    directory: Path
    """Folder with its files."""
    key: str
    """Beginning of the hash of its tokenizer.json, by which vocabularies are told apart."""
    base_size: int
    """V, number of the seed's ids; new pieces have the ids from here on."""
    expansions: Sequence[Sequence[int]]
    """For each new piece, the ids that the seed's tokenizer makes of it."""

    @property
    def size(self) -> int:
        """Number of ids, and rows of the embedding."""
        return self.base_size + len(self.expansions)

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of ids in each expansion, and all expansions, one after the other."""
        counts = np.asarray([len(ids) for ids in self.expansions], np.int64)
        return counts, np.asarray([id for ids in self.expansions for id in ids], np.int64)

    def counts(self, ids: Integer[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Number of ids of the seed that each id stands for."""
        new = ids >= self.base_size
        found = np.ones(len(ids), np.int64)
        found[new] = self._table[0][np.asarray(ids)[new] - self.base_size]
        return found

    def expand(self, ids: Integer[np.ndarray, " T"]) -> Int[np.ndarray, " T1"]:
        """The same text in the seed's ids: each new id is replaced by its expansion."""
        ids = np.asarray(ids, np.int64)
        if not len(ids) or ids.max() < self.base_size:
            return ids
        counts, (sizes, flat) = self.counts(ids), self._table
        firsts = np.cumsum(sizes) - sizes
        # The place of each id of the result within the expansion that it belongs to.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        source = np.repeat(ids, counts)
        new = source >= self.base_size
        found = source.copy()
        found[new] = flat[firsts[source[new] - self.base_size] + within[new]]
        return found

    def segment(
        self, ids: Integer[np.ndarray, " T"], groups: Integer[np.ndarray, " T"] | None = None
    ) -> tuple[Int[np.ndarray, " T1"], Int[np.ndarray, " T1"]]:
        """The same text as the extended tokenizer segments it, given the seed's ids; and for each
        id of the result the index of the given id with which its text ends. (That is exact where
        each piece is a run of the given ids, as by BPE; otherwise it is in proportion.)

        groups: numbers of the ids; neighbours with different ones do not become one piece. Special
        tokens stay, and so do ids that the seed's tokenizer does not make of their own text, as
        where a text ends within a character."""
        ids = np.asarray(ids, np.int64)
        special = np.isin(ids, [*self.base.special.ids.values()])
        begins = np.ones(len(ids), bool)
        begins[1:] = special[1:] | special[:-1]
        if groups is not None:
            begins[1:] |= np.asarray(groups)[1:] != np.asarray(groups)[:-1]
        runs = np.split(np.arange(len(ids)), np.flatnonzero(begins)[1:]) if len(ids) else []
        texts = ["" if special[run[0]] else self.base.decode(ids[run].tolist()) for run in runs]
        found, places = [ids[:0]], [ids[:0]]
        for run, old, new in zip(runs, self.base.encode(texts), self.tokenizer.encode(texts)):
            pieces = np.asarray(new if old == ids[run].tolist() else ids[run], np.int64)
            ends = np.cumsum(self.counts(pieces))
            found.append(pieces)
            places.append(run[-(-ends * len(run) // ends[-1]) - 1])
        return np.concatenate(found), np.concatenate(places)


def key_of(directory: str | Path) -> str:
    """The key of the vocabulary of a checkpoint."""
    return sha256(Path(directory) / "tokenizer.json")[:12]


def load_vocabulary(
    directory: str | Path, base: Tokenizer, base_size: int, start_token: StartToken
) -> Vocabulary:
    """The vocabulary of a directory that `vocabulary_training.extend` wrote. base: the seed's
    tokenizer, of which it has the special tokens and the chat template as they are now: these may
    be put beside a seed later. base_size: V. start_token: as `RunConfig.start_token`. UserError if
    its ids are not those of the seed and more."""
    extended = tokenizers.load(directory, start_token)
    extended.hub.chat_template = base.hub.chat_template
    for name in ("start_id", "prefix_id", "ignored", "end_ids"):
        setattr(extended, name, getattr(base, name))
    before, after = base.hub.get_vocab(), extended.hub.get_vocab()
    moved = [piece for piece, id in before.items() if after.get(piece) != id]
    if moved or sorted(after.values())[base_size:] != list(range(base_size, len(after))):
        raise UserError(
            f"the tokenizer of {directory} is not that of the seed with more pieces"
            + (f": {moved[0]!r} has another id" if moved else "")
        )
    backend = base.special.plain
    names = extended.hub.convert_ids_to_tokens(list(range(base_size, extended.size)))
    expansions = [[token.id for token in backend.model.tokenize(name)] for name in names]
    return Vocabulary(
        tokenizer=extended,
        base=base,
        directory=Path(directory),
        key=key_of(directory),
        base_size=base_size,
        expansions=expansions,
    )


def place_in(store: Path, key: str) -> Path:
    """Directory of the same documents as those of a store, in ids of another vocabulary."""
    return store / f"pieces-{key}"


def in_pieces_of(ids: TokenizedLanguage, key: str) -> TokenizedLanguage:
    """The same documents in ids of another vocabulary, if they were tokenised by it, as the text of
    an expert with an extended vocabulary is; otherwise in the seed's ids, which are ids of every
    vocabulary."""
    place = place_in(ids.directory, key)
    if not place.is_dir():
        return ids
    # What is known of the documents' origin is in the store of the seed's ids.
    return replace(open_store(place).languages[ids.language], directory=ids.directory)
