"""Trains sentencepiece tokenizers for fresh seeds, which `transformers.AutoTokenizer` loads and
which then give the ids that sentencepiece gives."""

import io
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from xelm.config import TokenizerAlgorithm

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# Characters of the names of special and byte pieces. They are pieces themselves, so that a text
# that spells such a name is never read as the special piece.
CONTROL_CHARACTERS = "<>/spadunkx0123456789ABCDEF"
# Bytes of training text; counts of pieces converge long before that.
TRAINING_BYTES = 40_000_000
# Longest sentence in characters, each of up to four bytes in UTF-8.
LONGEST_SENTENCE = 4192


def train(
    texts: Mapping[str, Sequence[str]],
    vocabulary_size: int,
    directory: str | Path,
    *,
    algorithm: TokenizerAlgorithm = "bpe",
    sizes: Mapping[str, int] | None = None,
    exponent: float = 0.3,
    random_seed: int = 0,
) -> None:
    """Trains a tokenizer with byte fallback and writes its files into `directory`.

    algorithm: as `RunConfig.tokenizer_algorithm`. texts: documents by language. sizes: UTF-8 bytes
    of each language, of which `texts` may be a sample; None counts those of `texts`. A language's
    share of the training text is its share of the bytes to the power
    `exponent` (Conneau et al. 2020, XLM-R, section 3.1).
    """
    import sentencepiece

    if sizes is None:
        sizes = {tag: sum(len(t.encode()) for t in found) for tag, found in texts.items()}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(list(_sample(texts, sizes, exponent, random_seed))),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocabulary_size,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=CONTROL_CHARACTERS,
            # Identity keeps the ids equal to those of the tokenizers library, which reads no
            # compiled normaliser from us; text is NFC already.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST_SENTENCE * 4,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece="<pad>",
            bos_piece="<s>",
            eos_piece="</s>",
            unk_piece="<unk>",
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].split("] ")[-1]
        raise UserError(
            f"cannot train a tokenizer of {vocabulary_size} pieces (model.vocabulary_size) on this "
            f"corpus: {reason}"
        ) from error
    Path(directory).mkdir(parents=True, exist_ok=True)
    _write(model.getvalue(), algorithm, Path(directory))


class EvenSample:
    """Sample of limited size of the documents of one language, evenly spaced over all."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.documents: list[str] = []
        self.bytes = 0
        """UTF-8 bytes of all documents, kept or not."""
        self._kept_bytes, self._added, self._stride = 0, 0, 1

    def add(self, text: str) -> None:
        """Adds a document, which is kept if its turn has come."""
        size = len(text.encode())
        self.bytes += size
        if self._added % self._stride == 0:
            self.documents.append(text)
            self._kept_bytes += size
        self._added += 1
        while self._kept_bytes > self.most_bytes and len(self.documents) > 1:
            self.documents = self.documents[::2]
            self._kept_bytes = sum(len(kept.encode()) for kept in self.documents)
            self._stride *= 2


def _sample(
    texts: Mapping[str, Sequence[str]], sizes: Mapping[str, int], exponent: float, random_seed: int
) -> Iterator[str]:
    weights = {language: size**exponent for language, size in sizes.items() if size}
    total = min(TRAINING_BYTES, sum(sizes.values()))
    order = random.Random(random_seed)
    for language, weight in weights.items():
        wanted = total * weight / sum(weights.values())
        documents = list(texts[language])
        order.shuffle(documents)
        # The documents of a language with less text than its share are repeated.
        for document in itertools.cycle(documents):
            if wanted <= 0:
                break
            for line in document.splitlines():
                for start in range(0, len(line), LONGEST_SENTENCE):
                    yield line[start : start + LONGEST_SENTENCE]
            wanted -= len(document.encode())


def _write(model: bytes, algorithm: TokenizerAlgorithm, directory: Path) -> None:
    """Writes tokenizer.model, and the same model as tokenizer.json with its configuration."""
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = tokenizers.Tokenizer(_bpe(pieces) if algorithm == "bpe" else _unigram(pieces))
    # As sentencepiece does: one more space in front, whatever the text begins with.
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    fast.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast.add_special_tokens(
        [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in special.values()]
    )
    # `fast.save` would raise no OSError where the disk is full.
    (directory / "tokenizer.json").write_bytes(fast.to_str(pretty=True).encode())
    (directory / "tokenizer.model").write_bytes(model)
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _bpe(pieces: Any) -> Any:
    """The pieces of a sentencepiece model as a BPE model of the tokenizers library.

    sentencepiece joins the two neighbours whose join is the piece of the best score. tokenizers has
    a ranked list of pairs instead, so every division of a piece into two becomes a pair.
    """
    from tokenizers import models

    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    joined = sorted(
        (piece for piece, i in ids.items() if len(piece) > 1 and _is_text(pieces, i)),
        key=lambda piece: pieces.get_score(ids[piece]),
        reverse=True,
    )
    halves = ((piece[:n], piece[n:]) for piece in joined for n in range(1, len(piece)))
    merges = [(a, b) for a, b in halves if a in ids and b in ids]
    return models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True)


def _unigram(pieces: Any) -> Any:
    """The pieces of a sentencepiece model as a unigram model of the tokenizers library, which finds
    "<0x41>" and "</s>" in a text like any piece: their scores are such that it never chooses them.
    """
    from tokenizers import models

    scored = [
        (pieces.id_to_piece(i), pieces.get_score(i) if _is_text(pieces, i) else -1e4)
        for i in range(pieces.vocab_size())
    ]
    return models.Unigram(scored, UNK, byte_fallback=True)


def _is_text(pieces: Any, number: int) -> bool:
    """Whether a piece stands for its own characters."""
    return not (pieces.is_byte(number) or pieces.is_control(number) or pieces.is_unknown(number))
