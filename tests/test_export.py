"""`xelm export`: checkpoints out of a RUN, and GGUF files that llama.cpp reads as xelm does."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import transformers
from shared import needs_llama_cpp

from clustering.errors import UserError
from experts.grow import grow
from experts.lock import update
from xelm.data import tokenizer_training
from xelm.data.tokenizer import Tokenizer
from xelm.models.checkpoint import load_model
from xelm.runs import export, llama_cpp
from xelm.runs.run import open_run

CONVERTER = """
import pathlib, sys
model, _, file, _, dtype, _, name = sys.argv[1:]
assert name == "de-fr"
assert (pathlib.Path(model) / "model.safetensors").is_file()
pathlib.Path(file).write_text(f"GGUF of {dtype}")
"""


@pytest.fixture
def converter(tmp_path):
    """A folder with a program that stands for llama.cpp's converter."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.fixture
def llama(monkeypatch, tiny):
    """Stands for llama.cpp, which answers as xelm would; tests change how it does so."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xllamacpp")
    run, asked = open_run(tiny.directory), []

    def read(file, questions):
        assert file.read_text() == "GGUF of f32"
        asked.append(questions)
        model = load_model(run.registry().expert("de-fr").directory(run.directory))
        continuations = []
        for prompt in questions.prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + questions.new_tokens:
                ids.append(int(model(jnp.asarray([ids]))[0, -1].argmax()))
                if ids[-1] in run.tokenizer().end_ids:
                    break
            continuations.append(ids[len(prompt) :])
        ids = [run.tokenizer().begin(text) for text in questions.texts]
        return llama_cpp.Answers(ids=ids, continuations=continuations)

    monkeypatch.setattr(llama_cpp, "read", read)
    monkeypatch.setattr(export, "_NEW_TOKENS", 4)
    return asked


def test_a_copy_of_a_checkpoint_loads_as_the_expert_does(xelm, tiny, tmp_path):
    expert = open_run(tiny.directory).registry().expert("de-fr").directory(tiny.directory)
    for name in ("de-fr", "de-fr@v1"):
        outcome = xelm("export", tiny.directory, name, "--out", tmp_path / name)
        assert (outcome.code, outcome.out) == (0, f"{tmp_path / name}\n")
        for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
            assert (tmp_path / name / file).read_bytes() == (expert / file).read_bytes()
    assert xelm("export", tiny.directory, "seed", "--out", tmp_path / "seed").code == 0
    again = xelm("export", tiny.directory, "seed", "--out", tmp_path / "seed")
    assert again.code == 2 and "exists already and is left as it was" in again.err


def test_a_model_that_cannot_be_used_is_not_copied(xelm, copy, tmp_path):
    def said(name):
        outcome = xelm("export", copy.directory, name, "--out", tmp_path / "copy")
        assert outcome.code == 2 and not (tmp_path / "copy").exists()
        return outcome.err

    assert "no expert" in said("nobody") and "has no version 2" in said("de-fr@v2")
    assert xelm("retire", copy.directory, "de-fr").code == 0
    assert "de-fr@v1 is retired; bring it back with: xelm restore" in said("de-fr")
    update(copy.directory, lambda registry: grow(registry, "pt", "en-es"), "grow")
    assert "pt@v1 is in training: it has no published weights" in said("pt@v1")
    weights = copy.directory / "dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert "dense: " in said("dense")
    shutil.rmtree(copy.directory / "dense")
    assert "has no dense baseline" in said("dense")
    assert xelm("merge", copy.directory, "en-es", "seed", "--name", "mean").code == 0
    assert xelm("export", copy.directory, "merges/mean", "--out", tmp_path / "mean").code == 0
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
    # A version that is not in use may be copied by its own name.
    assert xelm("export", copy.directory, "de-fr@v1", "--out", tmp_path / "copy").code == 0


@pytest.mark.slow
def test_a_gguf_file_is_written_if_llama_cpp_reads_it_as_xelm_does(
    xelm, tiny, tmp_path, converter, llama
):
    out = tmp_path / "new" / "expert.gguf"
    outcome = xelm(
        *("export", tiny.directory, "de-fr", "--gguf", out, "--converter", converter, "--json")
    )
    assert outcome.code == 0, outcome.err
    (questions,) = llama
    assert outcome.json() == {
        **{"name": "de-fr", "file": str(out), "dtype": "float32"},
        **{"texts": len(questions.texts), "continuations": 8},
    }
    assert [path.name for path in out.parent.iterdir()] == ["expert.gguf"]
    assert out.read_text() == "GGUF of f32"
    # Text of its languages alone, of each in turn, and what tokenizers easily read otherwise.
    assert len(questions.texts) == 2 * 40 + len(export.HARD_TEXTS)
    documents = {tag: (tiny.corpus / f"{tag}.jsonl").read_text() for tag in ("de", "fr")}
    for number, text in enumerate(questions.texts[:80]):
        assert json.dumps(text, ensure_ascii=False)[1:20] in documents[("de", "fr")[number % 2]]
    assert {len(prompt) for prompt in questions.prompts} == {16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ids", "llama.cpp makes other ids of 1 of 84 texts; nothing was written. First: '"),
        ("token", "otherwise; nothing was written. Token 2 is 5 instead of "),
        ("end", "otherwise; nothing was written. It ends after 2 of 4 tokens"),
    ],
)
@pytest.mark.slow
def test_a_gguf_file_that_llama_cpp_reads_otherwise_is_refused(
    xelm, tiny, tmp_path, converter, llama, monkeypatch, change, said
):
    read = llama_cpp.read

    def otherwise(file, questions):
        answers = read(file, questions)
        if change == "ids":
            answers.ids[7][3:] = [99, 98]
            own = open_run(tiny.directory).tokenizer().begin(questions.texts[7])[3:]
            shown = f"{', '.join(map(str, own[:8]))}, ..."
            expected.append(f"from token 3 on [99, 98] instead of [{shown}]")
            expected.append(f"First: {questions.texts[7][:80]!r}")
        elif change == "token":
            answers.continuations[1][1] = 5
        else:
            del answers.continuations[1][2:]
        return answers

    expected = [said]
    monkeypatch.setattr(llama_cpp, "read", otherwise)
    out = tmp_path / "new" / "expert.gguf"
    outcome = xelm("export", tiny.directory, "de-fr", "--gguf", out, "--converter", converter)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in expected), outcome.err
    assert "unigram" not in outcome.err
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_a_nearly_as_likely_token_is_no_other_continuation(
    xelm, tiny, tmp_path, converter, llama, monkeypatch
):
    """Both round differently, and go on from the token that llama.cpp took."""
    read = llama_cpp.read
    run = open_run(tiny.directory)
    model = load_model(run.registry().expert("de-fr").directory(run.directory))

    def second(file, questions):
        answers = read(file, questions)
        for prompt, continuation in zip(questions.prompts, answers.continuations):
            logits = model(jnp.asarray([prompt]))[0, -1]
            continuation[:] = [int(logits.argsort()[-2])]
            gaps.append(float(logits.max() - logits[continuation[0]]))
        return answers

    gaps = []
    monkeypatch.setattr(llama_cpp, "read", second)
    monkeypatch.setattr(export, "_NEW_TOKENS", 1)
    command = ("export", tiny.directory, "de-fr", "--converter", converter, "--gguf")
    refused = xelm(*command, tmp_path / "one.gguf")
    assert f"{gaps[0]:.3g} nats likelier" in refused.err
    monkeypatch.setattr(export, "_TIES", {"float32": max(gaps) + 1e-3})
    assert xelm(*command, tmp_path / "other.gguf").code == 0


def test_a_unigram_tokenizer_is_named_as_the_cause(
    xelm, copy, tmp_path, converter, llama, monkeypatch
):
    run = open_run(copy.directory)
    texts = {"de": [run.tokenizer().decode(run.store().languages["de"].ids)]}
    folder = tmp_path / "unigram"
    tokenizer_training.train(texts, 400, folder, algorithm="unigram")
    tokenizer = Tokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    with pytest.raises(UserError, match=r"is a unigram model, which llama\.cpp reads as BPE"):
        export._check_ids(tokenizer, ["a"], [[1]], [[2]])


def test_what_is_missing_is_said_before_any_work(xelm, tiny, tmp_path, converter, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    command = ("export", tiny.directory, "de-fr", "--gguf", tmp_path / "a.gguf")
    outcome = xelm(*command)
    assert outcome.code == 2 and outcome.err == (
        "xelm: llama.cpp's convert_hf_to_gguf.py is not installed: get "
        "https://github.com/ggml-org/llama.cpp and name its folder with --converter or LLAMA_CPP, "
        "or put the script on PATH\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    assert f"there is no converter {tmp_path / 'nowhere'}" in xelm(*command).err
    monkeypatch.setenv("LLAMA_CPP", str(converter))
    assert "run: pip install 'xelm[gguf]'" in xelm(*command).err
    assert not (tmp_path / "a.gguf").exists()
    both = xelm("export", tiny.directory, "de-fr", "--out", tmp_path / "b", "--converter", "c")
    assert both.code == 2 and "--converter goes with --gguf" in both.err


def test_the_converter_is_found_where_it_is_said_to_be(tmp_path, converter, monkeypatch):
    script = converter / "convert_hf_to_gguf.py"
    monkeypatch.setenv("PATH", str(converter))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    script.chmod(0o755)
    assert llama_cpp.find_converter(None) == (str(script),)
    monkeypatch.setenv("LLAMA_CPP", str(shutil.copytree(converter, tmp_path / "other")))
    other = tmp_path / "other" / "convert_hf_to_gguf.py"
    assert llama_cpp.find_converter(None) == (sys.executable, str(other))
    assert llama_cpp.find_converter(script) == (sys.executable, str(script))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('ERROR: Model XGLM is not supported')", "Model XGLM is not support"),
        ("import nothing_that_exists", "ModuleNotFoundError: No module named 'nothing_that"),
        ("", "did not convert"),
        ("import sys; open(sys.argv[3], 'w').write('half'); sys.exit(3)", "ended with code 3"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(
    xelm, tiny, tmp_path, converter, llama, program, said
):
    (converter / "convert_hf_to_gguf.py").write_text(program)
    out = tmp_path / "new" / "a.gguf"
    outcome = xelm("export", tiny.directory, "de-fr", "--gguf", out, "--converter", converter)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_a_reader_that_fails_leaves_nothing(tmp_path, monkeypatch):
    crash = "import sys; sys.stdin.read(); sys.exit('GGML_ASSERT(n > 0) failed')"
    monkeypatch.setattr(llama_cpp, "READER", (sys.executable, "-c", crash))
    questions = llama_cpp.Questions(texts=["a"], prompts=[[1]], new_tokens=1)
    with pytest.raises(UserError, match=r"cannot read the GGUF file: GGML_ASSERT"):
        llama_cpp.read(tmp_path / "a.gguf", questions)
    answer = "import sys; print('a line of theirs'); print(sys.stdin.read().replace('texts', 'ids')"
    answer += ".replace('prompts', 'continuations').replace(', \"new_tokens\": 1', ''))"
    monkeypatch.setattr(llama_cpp, "READER", (sys.executable, "-c", answer))
    assert llama_cpp.read(tmp_path / "a.gguf", questions).continuations == [[1]]


@needs_llama_cpp
def test_llama_cpp_itself_reads_a_bpe_expert_as_xelm_does(xelm, tiny, tmp_path):
    outcome = xelm("export", tiny.directory, "de-fr", "--gguf", tmp_path / "a.gguf")
    assert outcome.code == 0, outcome.err
    assert "the same ids of 84 texts and continues 8 prompts" in outcome.out
    assert Path(tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
