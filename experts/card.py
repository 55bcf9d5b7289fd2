"""The model card of an expert: Markdown with the front matter that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experts.expert import SEED, Expert, parse_reference
from experts.places import name_of
from experts.registry import Registry

# Keys of the front matter that only the user knows (https://huggingface.co/docs/hub/model-cards).
FRONT_MATTER_FACTS = ("base_model", "license", "license_name", "license_link")
_SECTIONS = re.compile("^## (?:Use|Files)$", re.MULTILINE)
"""Headings of the sections with which a card ends."""


def card(
    expert: Expert,
    registry: Registry,
    facts: Mapping[str, str | int | float],
    *,
    masked: bool = False,
) -> str:
    """The text of README.md for a published expert of `registry`.

    `facts` are shown under their keys, in their order. 'base_model' (the Hub name of the seed),
    'license', 'license_name' and 'license_link' go into the front matter instead, if they are
    given: the Hub refuses made-up values. `masked`: the expert is an encoder, which fills masks."""
    sections = (
        _front_matter(_languages(expert), facts, masked=masked, adapter=expert.stored == "adapter"),
        f"# {expert.name}",
        _introduction(expert),
        table(("", ""), _rows(expert, registry, facts)),
        *(("## Text", _text(expert)) if expert.data else ()),
        *_use_and_files(_use(expert, registry), expert.sha256, masked=masked),
    )
    return "\n\n".join(sections) + "\n"


def combined_card(
    name: str,
    introduction: str,
    languages: Sequence[str],
    facts: Mapping[str, str | int | float],
    sha256: Mapping[str, str],
) -> str:
    """The text of README.md for a model that continues text in several languages and was made of
    several experts. introduction: its first paragraph. `facts` are as in `card`."""
    rows = [("languages", ", ".join(languages)), *_shown(facts)]
    sections = (
        _front_matter(languages, facts, masked=False),
        f"# {name}",
        introduction,
        table(("", ""), rows),
        *_use_and_files(_USE, sha256, masked=False),
    )
    return "\n\n".join(sections) + "\n"


def _use_and_files(use: str, sha256: Mapping[str, str], *, masked: bool) -> tuple[str, ...]:
    """Sections that say how to load a model, and list its files with their hashes."""
    return (
        "## Use",
        use.format(model="AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"),
        "## Files",
        table(("file", "SHA-256"), [(f"`{f}`", f"`{h}`") for f, h in sorted(sha256.items())]),
    )


_USE = """\
```python
from transformers import {model}, AutoTokenizer

directory = "."  # the directory of this card
model = {model}.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
```"""


_USE_ADAPTER = """\
This directory has an adapter of the library PEFT. It is for PARENT, which is another checkpoint:

```python
from peft import PeftModel
from transformers import {model}, AutoTokenizer

base = "BASE"  # the directory of PARENT
model = PeftModel.from_pretrained({model}.from_pretrained(base), ".")
tokenizer = AutoTokenizer.from_pretrained(base)
```"""
_USE_CHAIN = """\
This directory has an adapter of PARENT, which is no complete checkpoint itself: `xelm export
--adapter` writes one adapter, in the files of PEFT, of the checkpoint that the chain of parents
begins with, and `xelm export --out` a complete checkpoint."""
_USE_DIFFERENCE = """\
This directory has only what differs from PARENT, and other programs cannot load it: `xelm export`
writes a complete checkpoint."""


_USE_SHARED_ADAPTER = """\
This repository has an adapter of the library PEFT. It is for PARENT, which is another checkpoint.
WHERE

```python
from peft import PeftModel
from transformers import {model}, AutoTokenizer

base = BASE
model = PeftModel.from_pretrained({model}.from_pretrained(**base), "REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained(**base)
```"""
_USE_SHARED_CHAIN = """\
This repository has an adapter of PARENT, which is an adapter itself. WHERE A RUN that has both
exports a complete checkpoint: pull them into it (`xelm pull REPOSITORY --into RUN`, the parent
first), and then `xelm export RUN NAME --out DIR`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Where a model can be had on the Hugging Face Hub."""

    repository: str
    """OWNER/REPO."""
    revision: str | None = None
    """Commit or branch that has it; None: main."""
    folder: str | None = None
    """Folder of the repository; None: its root."""


def shared_card(
    text: str,
    expert: Expert,
    registry: Registry,
    *,
    repository: str,
    sha256: Mapping[str, str],
    parent: Shared | None,
    masked: bool = False,
) -> str:
    """A card as it is pushed with the expert alone: how the files of its repository are loaded, and
    where the parent of an adapter can be had.

    text: the card. repository: OWNER/REPO to which it is pushed. sha256: of the files there.
    parent: where that is; None where it is not known."""
    adapter = expert.stored == "adapter"
    use = _shared_use(expert, registry, repository, parent) if adapter else _USE
    files = {name: digest for name, digest in sha256.items() if name != "README.md"}
    body = "\n\n".join(_use_and_files(use, files, masked=masked))
    kept = _SECTIONS.split(text)[0].rstrip()
    if adapter and parent is not None and parent.folder is None:
        kept = _with_base(kept, parent.repository)
    return f"{kept}\n\n{body}\n"


def _shared_use(expert: Expert, registry: Registry, repository: str, parent: Shared | None) -> str:
    """How an adapter is loaded from its repository, with {model} for the class of transformers."""
    seed = expert.parent == SEED
    name = "the seed" if seed else f"the expert {expert.parent}"
    base = None if seed else registry.expert(*parse_reference(expert.parent))
    what = SEED if base is None else base.name
    chained = base is not None and base.stored == "adapter"
    given = 'dict(pretrained_model_name_or_path="DIR")  # its directory'
    if parent is None:
        pushed = "" if seed else f"`xelm push RUN {what} --to OWNER/REPO` shares it, and "
        where = (
            "Where that can be had is not recorded. Ask those who share this repository for it: "
            f"{pushed}`xelm export RUN {what} --out DIR` writes it into a directory."
        )
    else:
        options = {"pretrained_model_name_or_path": parent.repository}
        options |= {"revision": parent.revision} if parent.revision else {}
        options |= {"subfolder": parent.folder} if parent.folder else {}
        shown = ", ".join(f'{key}="{value}"' for key, value in options.items())
        given = f"dict({shown})"
        inside = f", in the folder {parent.folder}" if parent.folder else ""
        where = f"It is in the repository {parent.repository}{inside}."
    use = _USE_SHARED_CHAIN if chained else _USE_SHARED_ADAPTER
    for word, value in (("PARENT", name), ("WHERE", where), ("BASE", given)):
        use = use.replace(word, value)
    return use.replace("REPOSITORY", repository).replace("RUN NAME", f"RUN {expert.name}")


def _with_base(card: str, repository: str) -> str:
    """A card whose front matter names the repository of the parent."""
    head, mark, rest = card.removeprefix("---\n").partition("\n---")
    if not card.startswith("---\n") or not mark:
        return card
    lines = [line for line in head.splitlines() if not line.startswith("base_model")]
    lines += [f"base_model: {json.dumps(repository)}", "base_model_relation: adapter"]
    return "\n".join(["---", *lines, "---"]) + rest


def _use(expert: Expert, registry: Registry) -> str:
    """How an expert is loaded, with {model} for the class of transformers."""
    parent = "the seed" if expert.parent == SEED else f"the expert {expert.parent}"
    based = expert.parent != SEED and registry.expert(*parse_reference(expert.parent)).stored
    adapter = _USE_CHAIN if based else _USE_ADAPTER
    kinds = {"adapter": adapter, "difference": _USE_DIFFERENCE}
    return kinds.get(expert.stored or "", _USE).replace("PARENT", parent)


def _front_matter(
    languages: Sequence[str],
    facts: Mapping[str, str | int | float],
    *,
    masked: bool,
    adapter: bool = False,
) -> str:
    task = "fill-mask" if masked else "text-generation"
    # JSON strings are YAML strings; unquoted, the language "no" would be the truth value false.
    lines = ["---"]
    lines += ["language:", *(f"- {json.dumps(language)}" for language in languages)]
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {task}"]
    lines += ["tags:", "- xelm"]
    lines += [f"{key}: {json.dumps(str(facts[key]))}" for key in FRONT_MATTER_FACTS if key in facts]
    return "\n".join([*lines, "---"])


def _languages(expert: Expert) -> tuple[str, ...]:
    """Languages that the expert was trained on; in a cluster of documents, more than it serves."""
    return tuple(expert.documents or expert.languages)


def _introduction(expert: Expert) -> str:
    served = ", ".join(_languages(expert))
    if expert.documents:
        served = f"documents like those of one cluster, in {served}"
    return (
        "A cross-lingual expert language model (X-ELM, "
        f"[Blevins et al. 2024](https://arxiv.org/abs/2401.10440)) for {served}. It stands alone, "
        "and it is made to be one of an ensemble of experts from the same seed."
    )


def _rows(
    expert: Expert, registry: Registry, facts: Mapping[str, str | int | float]
) -> list[tuple[str, str]]:
    shown = _shown(facts)
    for tag, bits in (expert.evaluation or {}).get("own", {}).items():
        others = "" if expert.parent == SEED else f"its parent {bits['parent']:.3f}, "
        if "present" in bits:
            others += f"the version before {bits['present']:.3f}, "
        figures = f"{bits['expert']:.3f} bits a byte ({others}the seed {bits['seed']:.3f})"
        shown.append((f"held-out text in {tag}", figures))
    origin = "grown from its parent" if expert.made is None else "not trained in this RUN"
    adopted = expert.made is not None and not expert.tokens
    return [
        ("version", str(expert.version)),
        ("languages", ", ".join(_languages(expert))),
        ("cluster", expert.cluster or f"none: {origin}"),
        ("parent", expert.parent),
        *([("stored as", f"{expert.stored} of {expert.parent}")] if expert.stored else []),
        ("lineage", " ← ".join(_lineage(expert, registry))),
        ("round", str(expert.round)),
        ("tokens of training", "not known" if adopted else f"{expert.tokens:,}"),
        *shown,
    ]


def _shown(facts: Mapping[str, str | int | float]) -> list[tuple[str, str]]:
    """Rows of the facts that do not stand in the front matter."""
    return [(key, str(facts[key])) for key in facts if key not in FRONT_MATTER_FACTS]


def _text(expert: Expert) -> str:
    """Table of the text that the expert was trained on, by language and source, with what the
    data cards say."""
    rows = []
    for tag, texts in (expert.data or {}).items():
        for text in texts:
            counts = (
                f"{_role(text)}{text['documents']:,} documents "
                f"({text['held_out']:,} more held out), {text['tokens']:,} tokens, "
                f"{text['bytes']:,} bytes; SHA-256 {text['sha256']}"
            )
            rows.append((f"{tag}: {text['text']}", counts))
            for source in text["sources"] or ():
                card = source["card"] or {"": "no data card"}
                said = [f"{name}: {value}" if name else value for name, value in card.items()]
                rows.append((f"{tag}: {name_of(source['source'])}", "; ".join(said)))
            if text["sources"] is None:
                unknown = "not recorded whether it has a data card"
                rows.append((f"{tag}: {name_of(text['corpus'])}", unknown))
    return table(("text", "origin"), rows)


def _role(text: Mapping[str, Any]) -> str:
    """What a text is in the training, if that is recorded."""
    share = f"{text.get('share', 0):.1%} of the rows; "
    return {
        "replay": f"replayed against forgetting, {share}",
        "donor": f"of the parent's languages, {share}",
    }.get(text.get("role", ""), "")


def _lineage(expert: Expert, registry: Registry) -> list[str]:
    """References from the expert back to the seed."""
    known = {other.reference: other for other in registry.experts}
    line = [expert.reference]
    while expert.parent != SEED:
        expert = known[expert.parent]
        line.append(expert.reference)
    return [*line, SEED]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells become one line each."""
    cells = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
