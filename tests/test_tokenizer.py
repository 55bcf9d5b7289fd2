"""Tokenizers: ids of sentencepiece through transformers, nothing lost, small languages heard."""

import json
import random
import shutil
import unicodedata

import pytest
import sentencepiece
import transformers

from clustering.errors import UserError
from xelm.data import tokenizer as tokenizers
from xelm.data.tokenizer import BOS, EOS, PAD, UNK

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


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(texts(), 640, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.load(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD])
def test_ids_are_those_of_sentencepiece_and_decode_to_the_text(tokenizer, reference, text):
    (ids,) = tokenizer.encode([text])
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


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


def test_the_same_texts_give_the_same_files(directory, tmp_path):
    tokenizers.train(texts(), 640, tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_a_language_is_heard_in_proportion_to_its_bytes_to_the_exponent(exponent):
    corpus = {"de": texts(documents=2000)["de"], "el": texts(documents=50)["el"]}
    heard = {"de": 0, "el": 0}
    for line in tokenizers._sample(corpus, exponent, random_seed=0):
        heard["el" if "α" in line else "de"] += len(line.encode())
    sizes = {tag: sum(len(text.encode()) for text in found) for tag, found in corpus.items()}
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
        tokenizers.train(corpus, 335, tmp_path / str(exponent), exponent=exponent)
        trained = tokenizers.load(tmp_path / str(exponent))
        length[exponent] = len(trained.encode([SENTENCES["el"]])[0])
    assert length[0.0] < length[1.0]


def test_a_large_corpus_is_sampled_and_a_long_document_is_cut(monkeypatch):
    monkeypatch.setattr(tokenizers, "TRAINING_BYTES", 30_000)
    documents = [f"{number:05}" * 1000 for number in range(100)]
    sample = list(tokenizers._sample({"de": documents}, 0.3, random_seed=0))
    assert sum(map(len, sample)) == 30_000
    assert max(map(len, sample)) == tokenizers.LONGEST_SENTENCE
    starts = [line for line in sample if len(line) == tokenizers.LONGEST_SENTENCE]
    assert len(starts) == len(set(starts)) == 6  # that many documents, none twice


@pytest.mark.parametrize(("size", "reason"), [(100_000, "Vocabulary size"), (100, "100 pieces")])
def test_a_vocabulary_that_does_not_fit_the_corpus_is_a_users_mistake(tmp_path, size, reason):
    with pytest.raises(UserError, match=f"cannot train a tokenizer of {size} pieces") as caught:
        tokenizers.train(texts(), size, tmp_path / "out")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_tokenizer_is_a_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="has no tokenizer that transformers can load") as caught:
        tokenizers.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


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
