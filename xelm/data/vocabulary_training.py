"""Extends a tokenizer: its own algorithm goes on on new text, and the pieces that it finds get ids
behind all others. A text that has none of them is cut as before.

BPE. Words are cut by the tokenizer first, and its merges come first in the extended one, too. Two
neighbours that are most frequent become a piece, and so on (Sennrich et al. 2016, arXiv
1508.07909). Where characters are spelled as bytes or unknown, the most frequent ones become pieces
before. So every new piece stands for a run of tokens of the old tokenizer, always the same ones.

Unigram. Candidates are the frequent substrings of words. Their scores are estimated by hard EM
while those of the old pieces stay, and candidates without which the text would lose least
likelihood are dropped until as many are left as are wanted (Kudo 2018, arXiv 1804.10959).
"""

import heapq
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.data.unicode import normalised
from xelm.models.companions import copy_companions

COVERAGE = 0.9995
"""Share of the characters spelled as bytes that become pieces first, as in sentencepiece."""
LEAST = 2
"""Smallest number of times that a new piece must occur in the text."""
LONGEST = 16
"""Longest new piece of a unigram tokenizer, in characters; that of sentencepiece."""
CANDIDATES = 10
"""Number of candidates of a unigram tokenizer for each new piece."""
KEPT = 0.75
"""Share of the candidates that are kept in each round; that of sentencepiece."""
_FILLER = "\ufdd5"
"""First character of the name of an id between the old and the new pieces: a noncharacter, which no
text has."""
_WORD = re.compile("\n|▁*[^▁\n]+|▁+")
_OTHER_FORMS = (
    *(
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ),
    "tekken.json",
)
"""Files that hold the pieces a second time."""


def extend(
    base: Tokenizer, source: Path, texts: Iterable[str], count: int, first: int, directory: Path
) -> None:
    """Writes a tokenizer with `count` more pieces, learned on `texts`, into a `directory`.

    base, source: the tokenizer, and the checkpoint with its files. first: id of the first new
    piece; ids between the last old one and it get names that no text has. tokenizer.json is that of
    `source` with more entries in `vocab` and, for BPE, at the end of `merges`; a tokenizer.model is
    extended the same way, and other files with pieces are left out. UserError for a tokenizer that
    is neither BPE nor unigram, and for more pieces than the text has."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    kind = kind_of(content["model"])
    words = words_of(base, texts)
    learn = _bpe_pieces if kind == "BPE" else _unigram_pieces
    pieces = learn(base, content["model"], words, count)
    if len(pieces) < count:
        raise UserError(
            f"--extend-vocabulary {count}: the text has {len(pieces)} more pieces that occur at "
            f"least {LEAST} times; give more text, or ask for fewer"
        )
    _add(content, pieces, first, {id: piece for piece, id in base.hub.get_vocab().items()})
    directory.mkdir(parents=True, exist_ok=True)
    copy_companions(source, directory)
    for name in _OTHER_FORMS:
        (directory / name).unlink(missing_ok=True)
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (directory / "tokenizer.json").write_bytes(text.encode())
    if (source / "tokenizer.model").is_file():
        _extend_sentencepiece(source, directory, content["model"]["vocab"], pieces, first)


def kind_of(model: Mapping[str, Any]) -> str:
    """BPE or Unigram, the kind of a model of tokenizer.json; UserError for another, which cannot be
    continued."""
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    marks = [n for n in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(n)]
    if kind not in ("BPE", "Unigram") or marks:
        found = f"{kind} with {marks[0]}" if marks else kind
        raise UserError(
            f"--extend-vocabulary goes on with the tokenizer's own algorithm, BPE or unigram; the "
            f"seed's is {found}"
        )
    return kind


def words_of(base: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words of some texts, as the tokenizer's model reads them, with how often they occur."""
    backend, words = base.special.plain, Counter[str]()
    for text in texts:
        text = normalised(text)
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is not None:
            parts = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        else:
            parts = [text]
        # Where the model reads whole texts, new pieces still end where a word or line does.
        words.update(word for part in parts for word in _WORD.findall(part))
    return words


def _bpe_pieces(
    base: Tokenizer, model: Mapping[str, Any], words: Counter[str], count: int
) -> dict[str, float]:
    """New pieces in the order of their merges; of characters and merges, the score is no matter."""
    known = model["vocab"]
    cut = [(_symbols(base, model, word), times) for word, times in words.items()]
    rare = Counter[str]()
    for symbols, times in cut:
        for symbol in symbols:
            if symbol not in known:
                rare[symbol] += times
    characters = _frequent(rare, count)
    return dict.fromkeys(
        [*characters, *_merges(cut, known, characters, count - len(characters))], 0
    )


def _symbols(base: Tokenizer, model: Mapping[str, Any], word: str) -> list[str]:
    """The pieces of a word, and the characters of which it has none."""
    backend, unknown = base.special.plain.model, model.get("unk_token")
    symbols: list[str] = []
    spelled = word.encode()
    first = last = 0

    def rest() -> list[str]:
        return list(spelled[first:last].decode())

    for token in backend.tokenize(word):
        begin, end = token.offsets  # in bytes
        value = token.value
        is_piece = value != unknown and spelled[begin:end] == value.encode()
        if is_piece:
            symbols += rest()
            symbols.append(value)
            first = end
        last = end
    return symbols + rest()


def _frequent(rare: Counter[str], most: int) -> list[str]:
    """The most frequent of some characters, up to their `COVERAGE` and to so many."""
    found, left = [], (1 - COVERAGE) * sum(rare.values())
    total = sum(rare.values())
    for character, times in sorted(rare.items(), key=lambda item: (-item[1], item[0])):
        if len(found) == most or times < LEAST or total <= left:
            break
        found.append(character)
        total -= times
    return found


def _merges(
    cut: Sequence[tuple[list[str], int]], known: Mapping[str, Any], new: Iterable[str], count: int
) -> list[str]:
    """Pieces that the most frequent pairs of neighbours make, one after the other."""
    pieces = {*known, *new}
    words = [(symbols, times) for symbols, times in cut if len(symbols) > 1]
    counts, places = Counter[tuple[str, str]](), defaultdict[tuple[str, str], set[int]](set)
    for number, (symbols, times) in enumerate(words):
        for pair in itertools.pairwise(symbols):
            counts[pair] += times
            places[pair].add(number)
    made: list[str] = []

    def allowed(pair: tuple[str, str]) -> bool:
        # What exists already would be reached another way than by the merges before.
        return pair[0] in pieces and pair[1] in pieces and pair[0] + pair[1] not in pieces

    heap = [(-times, pair) for pair, times in counts.items()]
    heapq.heapify(heap)
    while heap and len(made) < count:
        times, pair = heapq.heappop(heap)
        if -times != counts[pair] or not allowed(pair):
            continue  # it has changed meanwhile, and is there a second time
        if -times < LEAST:
            break
        piece = pair[0] + pair[1]
        changed: set[tuple[str, str]] = set()
        for division in [(piece[:n], piece[n:]) for n in range(1, len(piece))]:
            for number in list(places.get(division, ())):
                symbols, often = words[number]
                for old in itertools.pairwise(symbols):
                    counts[old] -= often
                    places[old].discard(number)
                    changed.add(old)
                _join(symbols, division)
                for fresh in itertools.pairwise(symbols):
                    counts[fresh] += often
                    places[fresh].add(number)
                    changed.add(fresh)
        pieces.add(piece)
        made.append(piece)
        for other in changed:
            if counts[other] >= LEAST:
                heapq.heappush(heap, (-counts[other], other))
    return made


def _join(symbols: list[str], pair: tuple[str, str]) -> None:
    """Joins each such pair of neighbours, from the left, in place."""
    place = 0
    while place < len(symbols) - 1:
        if (symbols[place], symbols[place + 1]) == pair:
            symbols[place : place + 2] = [pair[0] + pair[1]]
        place += 1


def _unigram_pieces(
    base: Tokenizer, model: Mapping[str, Any], words: Counter[str], count: int
) -> dict[str, float]:
    """New pieces with their scores, the best first."""
    known: dict[str, float] = dict(model["vocab"])
    rare = Counter[str]()
    for word, times in words.items():
        for character in word:
            if character not in known:
                rare[character] += times
    characters = _frequent(rare, count)
    alphabet = {*characters, *(piece for piece in known if len(piece) == 1)}
    substrings = Counter[str]()
    for word, times in words.items():
        for first in range(len(word)):
            for last in range(first + 1, min(first + LONGEST, len(word)) + 1):
                if word[last - 1] not in alphabet:
                    break
                if last - first > 1:
                    substrings[word[first:last]] += times
    most = CANDIDATES * count
    ranked = (
        (times * len(piece), piece)
        for piece, times in substrings.items()
        if times >= LEAST and piece not in known and "▁" not in piece[1:]
    )
    candidates = [piece for _, piece in heapq.nsmallest(most, ((-n, p) for n, p in ranked))]
    total = sum(times * len(word) for word, times in words.items())
    scores = {piece: math.log(rare[piece] / total) for piece in characters}
    scores |= {piece: math.log(substrings[piece] / total) for piece in candidates}
    while True:
        for _ in range(2):
            scores = _estimated(model, words, scores, characters)
        left = len(scores)
        if left <= count:
            break
        kept = max(count, int(KEPT * left)) - len(characters)
        losses = _losses(model, words, known, scores, characters)
        best = heapq.nsmallest(kept, ((-loss, piece) for piece, loss in losses.items()))
        scores = {piece: scores[piece] for piece in [*characters, *(p for _, p in best)]}
    least = min(known.values())  # of a lower one, unknown characters would depend
    order = sorted(scores, key=lambda piece: (-scores[piece], piece))
    return {piece: max(scores[piece], least) for piece in order}


def _cut_counts(
    model: Mapping[str, Any], words: Counter[str], scores: Mapping[str, float]
) -> tuple[Counter[str], int]:
    """How often each piece occurs where words are cut the likeliest way, and the number of all."""
    from tokenizers import models

    pieces = [(piece, score) for piece, score in (*model["vocab"], *scores.items())]
    unigram = models.Unigram(pieces, model["unk_id"], bool(model.get("byte_fallback")))
    counts, total = Counter[str](), 0
    for word, times in words.items():
        tokens = unigram.tokenize(word)
        total += times * len(tokens)
        for token in tokens:
            counts[token.value] += times
    return counts, total


def _estimated(
    model: Mapping[str, Any],
    words: Counter[str],
    scores: Mapping[str, float],
    characters: Sequence[str],
) -> dict[str, float]:
    """Scores by how often the pieces occur; without those that occur less than `LEAST` times, but
    with all characters."""
    counts, total = _cut_counts(model, words, scores)
    kept = {piece for piece in scores if counts[piece] >= LEAST} | {*characters}
    return {p: math.log(max(counts[p], 1) / total) for p in scores if p in kept}


def _losses(
    model: Mapping[str, Any],
    words: Counter[str],
    known: Mapping[str, float],
    scores: Mapping[str, float],
    characters: Sequence[str],
) -> dict[str, float]:
    """For each candidate, how much likelihood the text would lose without it."""
    counts, _ = _cut_counts(model, words, scores)
    both = {**known, **scores}
    spared = {*characters}
    return {
        piece: counts[piece] * (scores[piece] - _without(piece, both))
        for piece in scores
        if piece not in spared
    }


def _without(piece: str, scores: Mapping[str, float]) -> float:
    """Score of the likeliest way to cut a piece into several."""
    best = [0.0, *[-math.inf] * len(piece)]
    for last in range(1, len(piece) + 1):
        for first in range(last):
            if last - first < len(piece) and (score := scores.get(piece[first:last])) is not None:
                best[last] = max(best[last], best[first] + score)
    return best[-1]


def _add(
    content: dict[str, Any], pieces: Mapping[str, float], first: int, names: Mapping[int, str]
) -> None:
    """Adds pieces to the content of tokenizer.json, the first one with the id `first`. names: of
    the ids before; added tokens, also those that only transformers knows, are numbered behind the
    model's pieces, unless the model has them as pieces."""
    model = content["model"]
    if isinstance(model["vocab"], dict):
        taken = {*model["vocab"].values()}
        for id in range(first):
            if id not in taken:
                model["vocab"][names.get(id, f"{_FILLER}{id}")] = id
        model["vocab"] |= {piece: first + number for number, piece in enumerate(pieces)}
        old = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        known = model["vocab"]
        halves = ((p[:n], p[n:]) for p in pieces for n in range(1, len(p)))
        model["merges"] = [*old, *([a, b] for a, b in halves if a in known and b in known)]
        return
    # As in a fresh tokenizer, the least score: no text has them.
    least = min(score for _, score in model["vocab"])
    for id in range(len(model["vocab"]), first):
        model["vocab"].append([names.get(id, f"{_FILLER}{id}"), least])
    model["vocab"] += [[piece, score] for piece, score in pieces.items()]


def _extend_sentencepiece(
    source: Path, directory: Path, vocab: Any, pieces: Mapping[str, float], first: int
) -> None:
    """Writes tokenizer.model with the new pieces, if the old one has the ids of tokenizer.json:
    programs such as llama.cpp's converter read it."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((source / "tokenizer.model").read_bytes())
    is_bpe = isinstance(vocab, dict)
    names = (
        {id: name for name, id in vocab.items()} if is_bpe else dict(enumerate(p for p, _ in vocab))
    )
    if any(names.get(id) != piece.piece for id, piece in enumerate(model.pieces)):
        return
    kinds = protobuf.ModelProto.SentencePiece  # type: ignore[attr-defined]
    least = min(piece.score for piece in model.pieces)
    for id in range(len(model.pieces), first):
        model.pieces.add(piece=names[id], score=least, type=kinds.UNUSED)
    for number, (piece, score) in enumerate(pieces.items()):
        model.pieces.add(piece=piece, score=least - 1 - number if is_bpe else score)
    model.trainer_spec.vocab_size = len(model.pieces)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
