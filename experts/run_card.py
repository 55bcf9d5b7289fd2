"""The card of a whole RUN on the Hugging Face Hub: Markdown with the front matter that it reads."""

import json
from collections.abc import Mapping, Sequence

from experts.card import FRONT_MATTER_FACTS, table
from experts.expert import Expert
from experts.registry import Registry


def run_card(
    title: str,
    registry: Registry,
    facts: Mapping[str, str],
    models: Sequence[str] = (),
    *,
    masked: bool = False,
) -> str:
    """The text of README.md for a RUN that is shared as OWNER/REPO, which `title` is.

    facts: 'base_model' (the Hub's name of the seed), 'license', 'license_name' and 'license_link',
    where they are known. models: names of further models in it, such as dense. `masked`: the
    experts are encoders, which fill masks."""
    experts = registry.published()
    languages = sorted({tag for expert in experts for tag in expert.documents or expert.languages})
    others = "".join(f", `{name}`" for name in models)
    verb, prompt = ("fill", "[MASK] ...") if masked else ("generate", "...")
    sections = [
        _front_matter(languages, facts, "fill-mask" if masked else "text-generation"),
        f"# {title}",
        "Cross-lingual expert language models (X-ELM, [Blevins et al. "
        "2024](https://arxiv.org/abs/2401.10440)): an ensemble of "
        f"{len(experts)} experts from one seed, for {', '.join(languages) or 'no language yet'}, "
        "with its clusters and routers. Each expert is a checkpoint of its own, in its folder.",
        "## Experts",
        table(("expert", "languages", "parent", "tokens", "held-out text"), _rows(experts)),
        f"Beside them: the seed{others}.",
    ]
    if sources := _sources(experts):
        sections += ["## Text", table(("licence of the text", "languages"), sources)]
    sections += ["## Use", _USE.format(title=title, verb=verb, prompt=prompt)]
    return "\n\n".join(sections) + "\n"


_USE = """\
```sh
pip install xelm
xelm pull {title} experts
xelm {verb} experts "{prompt}"
```

The text that the experts were trained on is not part of it."""


def _front_matter(languages: Sequence[str], facts: Mapping[str, str], task: str) -> str:
    # JSON strings are YAML strings; unquoted, the language "no" would be the truth value false.
    lines = ["---", *(["language:"] if languages else [])]
    lines += [f"- {json.dumps(language)}" for language in languages]
    lines += ["library_name: xelm", f"pipeline_tag: {task}", "tags:", "- xelm"]
    lines += [f"{key}: {json.dumps(facts[key])}" for key in FRONT_MATTER_FACTS if key in facts]
    return "\n".join([*lines, "---"])


def _rows(experts: Sequence[Expert]) -> list[tuple[str, ...]]:
    rows = []
    for expert in experts:
        own = (expert.evaluation or {}).get("own", {})
        figures = (
            f"{tag} {bits['expert']:.3f} (seed {bits['seed']:.3f})" for tag, bits in own.items()
        )
        rows.append(
            (
                f"[{expert.reference}]({expert.path})",
                " ".join(expert.documents or expert.languages),
                expert.parent,
                f"{expert.tokens:,}",
                ", ".join(figures) + (" bits a byte" if own else "not measured"),
            )
        )
    return rows


def _sources(experts: Sequence[Expert]) -> list[tuple[str, str]]:
    """Licence of text as its data cards declare it -> the languages that have such text."""
    found: dict[str, set[str]] = {}
    for expert in experts:
        for tag, texts in (expert.data or {}).items():
            for text in texts:
                cards = [source["card"] or {} for source in text["sources"] or [{"card": None}]]
                for card in cards:
                    found.setdefault(card.get("licence") or "not declared", set()).add(tag)
    return [(licence, " ".join(sorted(tags))) for licence, tags in sorted(found.items())]
