"""`xelm export`: a model of a RUN as a checkpoint elsewhere, or as a GGUF file for llama.cpp, which
is written only if llama.cpp reads it as xelm reads the model."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clustering.errors import UserError
from clustering.files import flush
from xelm.data.held_out import TrainingText, divide
from xelm.data.rows import LanguageShare
from xelm.data.tokenizer import Tokenizer
from xelm.data.unicode import normalised
from xelm.models.checkpoint import (
    all_or_nothing,
    copy_checkpoint,
    family_of,
    load_model,
    read_chain_adapter,
    read_config,
    stored_dtype,
    write_whole,
)
from xelm.models.peft import write_products
from xelm.models.stored import root, stored_as
from xelm.models.transformer import Transformer
from xelm.runs import llama_cpp
from xelm.runs.named import find_model
from xelm.runs.run import Run
from xelm.runs.shares import dense_text, expert_text
from xelm.runs.vocabulary import vocabulary_of

HARD_TEXTS = (
    "  two  in front,  two behind  ",
    "\tif x == 1:\n\t\treturn [x] * 2  # why\r\n\n\n",
    "🐟🇩🇪 \u200bሰላም ᚠᚢᚦ \u3000한국어는 हिन्दी",
    "1234567890 3.14159 ½ ==== ---- ....",
)
"""Texts of which tokenizers easily make other ids."""
_TEXTS = 40
"""Most documents of a language whose ids are compared."""
_TEXT_TOKENS = 256
"""Most tokens of such a document."""
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 8, 16, 24
# Both sides round differently: so near to the likeliest token, in nats, another is as good.
_TIES = {"float32": 1e-3}
_TIE_OF_16_BITS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufExport:
    """A GGUF file that llama.cpp reads as xelm reads the model."""

    file: Path
    """The file."""
    dtype: str
    """Dtype of its weights."""
    texts: int
    """Number of texts of which both make the same ids."""
    continuations: int
    """Number of prompts that both continue by the same tokens."""


class _Model(NamedTuple):
    """A model of a RUN."""

    directory: Path
    text: Callable[[], TrainingText]
    """Returns the text that it was trained on."""


def export(run: Run, name: str, out: str | Path) -> Path:
    """Copies a model's checkpoint into the new directory `out`, and returns `out`. name: as in
    `find_model`."""
    copy_checkpoint(find_model(run, name).directory, out, run.tokenizer().hub.save_pretrained)
    return Path(out)


def export_adapter(run: Run, name: str, out: str | Path) -> Path:
    """Writes an expert that was trained as an adapter, of its parent or of a chain of such parents,
    into the new directory `out` as one adapter, in PEFT's files, of the complete checkpoint that
    the chain begins with; ranks add up. Returns the path of that checkpoint. name: as in `export`.
    UserError for a model that is no adapter."""
    directory = _model(run, name).directory
    products, whole = read_chain_adapter(directory), root(directory)
    base = run.record.get("base_model") if whole == run.seed.absolute() else None
    with all_or_nothing(Path(out)) as partial:
        shape, kind = read_config(directory), family_of(directory)
        write_products(partial, shape, kind, products, base=base or str(whole))
    return whole


def export_gguf(
    run: Run, name: str, out: str | Path, converter: str | Path | None = None
) -> GgufExport:
    """Writes a model as the GGUF file `out` with llama.cpp's converter, and compares what llama.cpp
    makes of it with xelm: ids of texts in the model's languages, and greedy continuations.

    name: as in `export`. converter: as in `llama_cpp.find_converter`. UserError if they differ, and
    there is no file then."""
    model = _model(run, name)
    if not read_config(model.directory).causal:
        raise UserError(f"{name} is an encoder; a GGUF file is for models that continue text")
    if Path(out).exists():
        raise UserError(f"{out} exists already and is left as it was")
    command = llama_cpp.find_converter(converter)
    llama_cpp.check_reader()
    dtype, vocabulary = stored_dtype(model.directory), vocabulary_of(run, model.directory)
    tokenizer = vocabulary.tokenizer if vocabulary else run.tokenizer()
    texts = _texts(model.text(), run.tokenizer())
    ids = [tokenizer.begin(text) for text in texts]
    prompt_tokens = min(_PROMPT_TOKENS, run.context_length() // 2)
    new = min(_NEW_TOKENS, run.context_length() - prompt_tokens)
    prompts = [some[:prompt_tokens] for some in ids[:_PROMPTS]]
    with _complete(Path(out)) as file:
        whole = model.directory
        if stored_as(whole) is not None:
            whole = file.with_name("whole")
            write_whole(model.directory, whole)
        llama_cpp.convert(command, whole, file, dtype=dtype, name=name)
        if whole != model.directory:
            shutil.rmtree(whole)
        questions = llama_cpp.Questions(texts=texts, prompts=prompts, new_tokens=new)
        answers = llama_cpp.read(file, questions)
        _check_ids(tokenizer, texts, ids, answers.ids)
        loaded = load_model(model.directory, "float32")
        tie = _TIES.get(dtype, _TIE_OF_16_BITS)
        _check_continuations(tokenizer, loaded, prompts, answers.continuations, new, tie)
    return GgufExport(file=Path(out), dtype=dtype, texts=len(texts), continuations=len(prompts))


def _model(run: Run, name: str) -> _Model:
    """A model by name, whose files are as they were published."""
    found = find_model(run, name)
    if found.expert is not None:
        return _Model(found.directory, partial(expert_text, run, found.expert))
    return _Model(found.directory, partial(dense_text if name == "dense" else _corpus, run))


def _corpus(run: Run) -> TrainingText:
    languages = run.store().languages.values()
    sources = [LanguageShare(ids=ids, share=1.0) for ids in languages]
    return divide(sources, run.config.held_out)


def _texts(text: TrainingText, tokenizer: Tokenizer) -> list[str]:
    """Texts to compare: of each language documents from all over, held-out ones first, and
    `HARD_TEXTS`. The first texts are of different languages."""
    found: dict[str, list[str]] = {}
    for source in (*text.held_out, *text.sources):
        numbers = range(len(source.ids)) if source.documents is None else source.documents
        documents = found.setdefault(source.ids.language, [])
        wanted = _TEXTS - len(documents)
        for number in numbers[:: max(1, len(numbers) // max(1, wanted))][:wanted]:
            ids = source.ids.document(int(number))[:_TEXT_TOKENS].tolist()
            documents.append(tokenizer.decode(ids))
    in_turn = (one for some in zip_longest(*found.values()) for one in some)
    return [normalised(one) for one in (*in_turn, *HARD_TEXTS) if one]


def _check_ids(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    own: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> None:
    """Raises UserError for the first text of which llama.cpp makes other ids."""
    compared = zip(texts, map(list, own), map(list, theirs), strict=True)
    differing = [(text, a, b) for text, a, b in compared if a != b]
    if not differing:
        return
    text, a, b = differing[0]
    n = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    unigram = type(tokenizer.special.plain.model).__name__ == "Unigram"
    raise UserError(
        f"llama.cpp makes other ids of {len(differing)} of {len(texts)} texts; nothing was "
        f"written. First: {text[:80]!r}, from token {n} on {_shown(b[n:])} instead of "
        f"{_shown(a[n:])}"
        + ("; its tokenizer is a unigram model, which llama.cpp reads as BPE" if unigram else "")
    )


def _check_continuations(
    tokenizer: Tokenizer,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    new: int,
    tie: float,
) -> None:
    """Raises UserError for the first token by which llama.cpp continues a prompt and that is not
    the likeliest. The model reads llama.cpp's tokens, so that one tie does not make the rest
    differ. new: tokens of a continuation that no end token ended."""
    logits_of = nnx.jit(lambda model, tokens: model(tokens))
    length = max(map(len, prompts)) + new
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids = [*prompt, *continuation]
        row = np.zeros((1, length), np.int32)  # later positions are seen by none
        row[0, : len(ids)] = ids
        logits = np.asarray(logits_of(model, jnp.asarray(row)))[0, len(prompt) - 1 : len(ids) - 1]
        best = logits.argmax(-1).tolist()
        lost = logits.max(-1) - logits[np.arange(len(continuation)), list(continuation)]
        wrong = next((n for n, nats in enumerate(lost) if nats > tie), None)
        started = f"llama.cpp continues {tokenizer.decode(prompt)!r} otherwise; nothing was written"
        if wrong is not None:
            raise UserError(
                f"{started}. Token {wrong + 1} is {continuation[wrong]} instead of {best[wrong]}, "
                f"which is {lost[wrong]:.3g} nats likelier"
            )
        if len(continuation) < new and not {*continuation[-1:]} & tokenizer.end_ids:
            raise UserError(f"{started}. It ends after {len(continuation)} of {new} tokens")


def _shown(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which becomes `target` if the block does not raise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield folder / target.name
        flush(folder)
        (folder / target.name).rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
