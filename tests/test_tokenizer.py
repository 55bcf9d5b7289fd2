"""Tokenizers: ids of sentencepiece through transformers, nothing lost, small languages heard."""

import errno
import json
import os
import random
import resource
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import transformers

from clustering.errors import UserError
from xelm.data import tokenizer as tokenizers
from xelm.data import tokenizer_training
from xelm.data.tokenizer_training import BOS, EOS, PAD, UNK

SENTENCES = {
    "de": "Der alte Mann lebte am Meer und fuhr jeden Tag hinaus, um Fische zu fangen.",
    "el": "Ο γέρος ζούσε δίπλα στη θάλασσα και έβγαινε κάθε μέρα για ψάρεμα.",
    "hi": "एक बूढ़ा आदमी समुद्र के किनारे रहता था और हर दिन मछली पकड़ने जाता था।",
    "zh": "从前有个老人住在海边，他每天都出海去打鱼。",
    "ar": "كان هناك رجل عجوز يعيش على شاطئ البحر ويخرج كل يوم لصيد السمك.",
    "th": "ชายชราคนหนึ่งอาศัยอยู่ริมทะเลและออกไปจับปลาทุกวัน",
}
HARD = [
    "",
    "a",
    "  two  in front, two behind  ",
    "tab\tline\nreturn\r\nnull\0byte\x7f",
    "\u00a0no-break \u200bzero-width \u3000wide",
    "never seen: 🐟🇩🇪 ሰላም ᚠᚢᚦ \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "</s> <s> <unk> <pad> <0x41><0xFF> [MASK]",
    "def f(x):\n\tif x  ==  1:\n        return [x] * 2  # \t\t two\n",
    "==== ---- .... \n\n\n aaaaaaa ananananana",
    "हिन्दी में क्ष्म और कि़ताब, ज़्यादा",
    unicodedata.normalize("NFD", "한국어는 받침이 있다. Été à Đà Nẵng"),
    "1234567890 3.14159 ½ Ⅷ ﬁ",
    "x" * 500,
]


def texts(seed: int = 0, documents: int = 30) -> dict[str, list[str]]:
    """Documents of mixed-up words, or characters where words are not spaced."""
    draw = random.Random(seed)
    found = {}
    for language, sentence in SENTENCES.items():
        spaced = " " in sentence
        parts = sentence.split() if spaced else [sentence[i : i + 3] for i in range(len(sentence))]
        glue = " " if spaced else ""
        drawn = (glue.join(draw.choices(parts, k=25)) for _ in range(documents))
        found[language] = [unicodedata.normalize("NFC", text) for text in drawn]
    return found


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train(texts(), 640, path, algorithm=request.param)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.load(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD])
def test_ids_are_those_of_sentencepiece_and_decode_to_the_text(tokenizer, reference, text):
    (ids,), composed = tokenizer.encode([text]), unicodedata.normalize("NFC", text)
    by_transformers = tokenizer.hub.encode(text, split_special_tokens=True)
    assert ids == reference.encode(composed) == by_transformers[1:]
    assert tokenizer.decode(ids) == composed


def test_ids_of_mixed_documents_are_those_of_sentencepiece(tokenizer, reference):
    alphabet = "".join(SENTENCES.values()) + "  🐟ሰ\n<>"
    draw = random.Random(0)
    drawn = ("".join(draw.choices(alphabet, k=draw.randrange(200))) for _ in range(300))
    documents = [unicodedata.normalize("NFC", text) for text in drawn]
    documents += [text for language in texts(seed=1).values() for text in language]
    assert tokenizer.encode(documents) == [reference.encode(text) for text in documents]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(documents)] == documents


def test_every_text_has_its_own_ids_however_many_are_encoded_at_once(tokenizer):
    documents = [*SENTENCES.values(), *HARD]
    assert tokenizer.encode(documents) == [tokenizer.encode([text])[0] for text in documents]
    assert tokenizer.encode([]) == []


def test_no_text_spells_a_special_token(tokenizer):
    for ids in tokenizer.encode(["<s>", "</s>", "<pad>", "<unk>", "a</s>b", "\0", "🐟"]):
        assert not {PAD, BOS, EOS, UNK} & set(ids)


def test_special_tokens_have_their_ids_and_are_not_decoded(tokenizer):
    hub = tokenizer.hub
    assert (hub.pad_token_id, hub.bos_token_id, hub.eos_token_id, hub.unk_token_id) == (0, 1, 2, 3)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.size) == (BOS, EOS, 640)
    assert tokenizer.decode([BOS, *tokenizer.encode(["und Meer"])[0], EOS, PAD]) == "und Meer"


def test_transformers_loads_it_and_puts_the_start_token_first(directory, tokenizer):
    hub = transformers.AutoTokenizer.from_pretrained(directory)
    for text in SENTENCES.values():
        assert hub(text)["input_ids"] == [BOS, *tokenizer.encode([text])[0]]
        assert hub.decode(hub(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_same_texts_give_the_same_files(tmp_path, algorithm):
    for name in ("one", "other"):
        tokenizer_training.train(texts(), 640, tmp_path / name, algorithm=algorithm)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("one", "other"))
        assert one == other


def test_joins_of_a_bpe_tokenizer_are_those_of_sentencepiece_where_pieces_are_repeated(tmp_path):
    """There, a piece may be joined from different halves."""
    tokenizer_training.train(texts(), 900, tmp_path)
    bpe = tokenizers.load(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    draw = random.Random(0)
    pieces = [reference.id_to_piece(i).replace("▁", " ") for i in range(300, 900)]
    repeated = (draw.choice(pieces) * draw.randrange(1, 4) for _ in range(3000))
    documents = [unicodedata.normalize("NFC", "".join(some)) for some in zip(*[repeated] * 3)]
    assert bpe.encode(documents) == [reference.encode(text) for text in documents]
    assert bpe.special.plain.model.__class__.__name__ == "BPE"


@pytest.mark.parametrize("every", [1, 40])
@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_a_language_is_heard_in_proportion_to_its_bytes_to_the_exponent(exponent, every):
    corpus = {"de": texts(documents=2000)["de"], "el": texts(documents=50)["el"]}
    sizes = {tag: sum(len(text.encode()) for text in found) for tag, found in corpus.items()}
    corpus["de"] = corpus["de"][::every]  # of a large language only a sample is at hand
    heard = {"de": 0, "el": 0}
    for line in tokenizer_training._sample(corpus, sizes, exponent, random_seed=0):
        heard["el" if "α" in line else "de"] += len(line.encode())
    weights = {tag: size**exponent for tag, size in sizes.items()}
    for tag, weight in weights.items():
        assert heard[tag] / sum(heard.values()) == pytest.approx(
            weight / sum(weights.values()), rel=0.01
        )
    assert sum(heard.values()) == pytest.approx(sum(sizes.values()), rel=0.01)


def test_a_smaller_exponent_gives_a_small_language_longer_pieces(tmp_path):
    corpus = {"de": texts(documents=2000)["de"], "el": texts(documents=8)["el"]}
    length = {}
    for exponent in (0.0, 1.0):
        tokenizer_training.train(corpus, 335, tmp_path / str(exponent), exponent=exponent)
        trained = tokenizers.load(tmp_path / str(exponent))
        length[exponent] = len(trained.encode([SENTENCES["el"]])[0])
    assert length[0.0] < length[1.0]


def test_a_large_corpus_is_sampled_and_a_long_document_is_cut(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "TRAINING_BYTES", 30_000)
    documents = [f"{number:05}" * 1000 for number in range(100)]
    sample = list(
        tokenizer_training._sample({"de": documents}, {"de": 500_000}, 0.3, random_seed=0)
    )
    assert sum(map(len, sample)) == 30_000
    assert max(map(len, sample)) == tokenizer_training.LONGEST_SENTENCE
    starts = [line for line in sample if len(line) == tokenizer_training.LONGEST_SENTENCE]
    assert len(starts) == len(set(starts)) == 6  # that many documents, none twice


@pytest.mark.parametrize(
    ("most_bytes", "every"), [(3000, 1), (2999, 2), (1500, 2), (1499, 4), (3, 1024), (1, 1024)]
)
def test_a_sample_is_evenly_spaced_and_knows_the_size_of_all(most_bytes, every):
    documents = [f"{number:03}" for number in range(1000)]
    sample = tokenizer_training.EvenSample(most_bytes)
    for document in documents:
        sample.add(document)
    assert sample.documents == documents[::every]
    assert sample.bytes == 3000


def test_the_tokenizer_of_a_run_hears_all_of_a_corpus_and_its_true_sizes(
    xelm, tiny_corpus, tiny_settings, tmp_path, monkeypatch
):
    heard = {}

    def train(texts, vocabulary_size, directory, *, algorithm, sizes, **options):
        heard.update(texts=texts, sizes=sizes, algorithm=algorithm)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_training, "train", train)
    monkeypatch.setattr(tokenizer_training, "TRAINING_BYTES", 3000)
    command = ["--corpus", tiny_corpus, "--languages", "de,fr", *tiny_settings()]
    unigram = ("--set", "tokenizer_algorithm=unigram")
    assert xelm("init", tmp_path / "other", *command, *unigram).code == 130
    assert heard["algorithm"] == "unigram"
    assert xelm("init", tmp_path / "RUN", *command).code == 130
    assert heard["algorithm"] == "bpe"
    for language in ("de", "fr"):
        lines = (tiny_corpus / f"{language}.jsonl").read_text().splitlines()
        documents = [json.loads(line)["text"] for line in lines]
        assert heard["sizes"][language] == sum(len(text.encode()) for text in documents) > 3000
        kept = heard["texts"][language]
        assert kept == documents[:: -(-len(documents) // len(kept))]
        assert 1000 < sum(len(text.encode()) for text in kept) <= 3000


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    """The file may not grow, which the tokenizers library reports as a plain Exception."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(OSError) as caught:
            tokenizer_training.train(texts(), 640, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.errno == errno.EFBIG


def test_a_full_disk_leaves_no_half_tokenizer(
    xelm, tiny_corpus, tiny_settings, tmp_path, monkeypatch
):
    def full(texts, vocabulary_size, directory, **options):
        directory.mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer_training, "train", full)
    command = ["--corpus", tiny_corpus, "--languages", "de,fr", *tiny_settings()]
    outcome = xelm("init", tmp_path / "RUN", *command)
    assert outcome.code == 2
    target = tmp_path / "RUN" / "train" / "tokenizer"
    assert outcome.err.splitlines()[-1] == (
        f"xelm: cannot write {target}: No space left on device; nothing was changed"
    )
    assert list(target.parent.iterdir()) == []


def test_a_tokenizer_gets_its_name_when_its_bytes_are_on_disk(
    xelm, tiny_corpus, tiny_settings, tmp_path, monkeypatch
):
    fsync, flushed = os.fsync, set()

    def flush(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def rename(source, target):
        assert target.name == "tokenizer"
        assert {path.stat().st_ino for path in source.iterdir()} <= flushed
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", rename)
    command = ["--corpus", tiny_corpus, "--languages", "de,fr", *tiny_settings()]
    assert xelm("init", tmp_path / "RUN", *command).code == 130


@pytest.mark.parametrize(("size", "reason"), [(100_000, "Vocabulary size"), (100, "100 pieces")])
def test_a_vocabulary_that_does_not_fit_the_corpus_is_a_users_mistake(tmp_path, size, reason):
    message = rf"cannot train a tokenizer of {size} pieces \(model.vocabulary_size\)"
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_training.train(texts(), size, tmp_path / "out")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


FAMILIES = {"llama": "LlamaTokenizer", "xglm": "XGLMTokenizer"}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_without_a_tokenizer_is_a_users_mistake(tmp_path, family, named):
    """Where transformers would make one of the special tokens alone."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if named:
        settings = {"tokenizer_class": FAMILIES[family], "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        tokenizers.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no tokenizer; wanted tokenizer.json or tokenizer.model or "
        "sentencepiece.bpe.model or vocab.json or vocab.txt"
    )


def test_tekken_alone_is_refused_with_what_to_fetch(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        tokenizers.load(tmp_path)
    fetch = f"hf download OWNER/NAME --include 'tokenizer*' --local-dir {tmp_path}"
    assert fetch in str(caught.value)


def test_tokenizer_json_is_read_where_tekken_lies_beside_it(directory, tmp_path, monkeypatch):
    """With mistral-common installed, transformers would read the other one, of which it makes no
    tokenizer of the kind that is wanted here."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    made = transformers.AutoTokenizer.from_pretrained

    def with_mistral_common(*arguments, mistral_format=None, **options):
        assert mistral_format is False
        return made(*arguments, mistral_format=mistral_format, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", with_mistral_common)
    assert tokenizers.load(tmp_path).encode(["sea"]) == tokenizers.load(directory).encode(["sea"])


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("llama", "tokenizer.model", r"has no piece of plain text: .* both become \[\]"),
        ("xglm", "sentencepiece.bpe.model", r"has no piece of plain text: .* both become \[3\]"),
        ("xglm", "tokenizer.model", "has no tokenizer that transformers can load"),
        ("llama", "tokenizer.json", "has no tokenizer that transformers can load"),
    ],
)
def test_an_empty_tokenizer_is_a_users_mistake(tmp_path, family, name, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    settings = {"tokenizer_class": FAMILIES[family], "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=reason) as caught:
        tokenizers.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_unknown_ids_alone_is_a_users_mistake(directory, tmp_path):
    """Whole files that match each other, and no script of anybody's."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    pieces = [[f"#{n}#", -1.0] for n in range(3)] + [["<unk>", 0.0]]
    content["model"] = {"type": "Unigram", "vocab": pieces, "unk_id": 3, "byte_fallback": False}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'sea' and 'old' both become \[3\]"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(
    directory, tmp_path, monkeypatch, file
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path = tmp_path / file
    settings = json.loads(path.read_text()) if path.exists() else {"model_type": "own"}
    mapped = {"AutoTokenizer": ["code.Own", "code.Own"], "AutoConfig": "code.Own"}
    settings |= {"auto_map": mapped, "tokenizer_class": "Own"}
    path.write_text(json.dumps(settings))
    try:
        tokenizers.load(tmp_path)
    except UserError as error:
        assert "has no tokenizer that transformers can load" in str(error)
        assert "\n" not in str(error)
    assert asked == [] and not (tmp_path / "ran").exists()
