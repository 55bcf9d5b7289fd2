"""`xelm experts` and `xelm diff`: what is recorded of the experts of a RUN, and how two models
differ. Nothing is measured here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.expert import SEED, Expert, parse_reference
from experts.registry import Registry
from xelm.runs.run import Run
from xelm.training.metrics import METRICS, trained_tokens

_HIDDEN = ("name", "version", "path", "sha256", "evaluation", "published_as", "replaces")
"""Keys of a record that are shown in another form, or say nothing about the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedExpert:
    """One version of an expert, as `xelm experts` lists it."""

    name: str
    version: int
    status: str
    """Status, or "parent" for the intermediate expert of a round that is trained."""
    parent: str
    languages: tuple[str, ...]
    """Languages that it serves; in clusters of documents, those that it was trained on."""
    tokens: int
    """Number of tokens of its training."""
    bytes: int
    """Size of its directory; 0 where there is none."""
    figures: Mapping[str, float]
    """Model, "expert", "parent" or "seed" -> mean bits a byte over its languages on held-out text;
    empty if that was not measured."""


def list_experts(run: Run) -> list[ListedExpert]:
    """All versions of all experts, in order of round, name and version."""
    found = sorted(run.registry().experts, key=lambda e: (e.round, e.name, e.version))
    return [
        ListedExpert(
            name=expert.name,
            version=expert.version,
            status=expert.state,
            parent=expert.parent,
            languages=expert.languages or tuple(expert.documents or ()),
            tokens=expert.tokens,
            bytes=_size(expert.directory(run.directory)),
            figures=_means((expert.evaluation or {}).get("own", {})),
        )
        for expert in found
    ]


def _means(own: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    models = [name for name in ("expert", "parent", "seed") if own]
    return {name: sum(found[name] for found in own.values()) / len(own) for name in models}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact in which two models differ."""

    name: str
    """Name of the fact, such as "tokens" or "bits a byte in sv"."""
    first: Any
    """Value of the first model; None if there is none."""
    second: Any
    """Value of the second model; None if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models of a RUN, and all that is recorded in which they differ, figures first."""

    first: str
    """Reference 'NAME@vN', or 'seed'."""
    second: str
    """The same of the second model."""
    differences: list[Difference]


def compare(run: Run, first: str, second: str) -> Comparison:
    """Compares two models: figures on held-out text, data, settings, parent, tokens, size.

    first, second: 'NAME' (the published version, or else the newest), 'NAME@vN', or 'seed'. A
    figure of which a model has no record is that of the other's evaluation, if it is its parent or
    the seed. UserError for a model that does not exist.
    """
    registry = run.registry()
    models = [_model(registry, name) for name in (first, second)]
    facts = [
        _figures(model, other) | dict(_facts(run, registry, model))
        for model, other in zip(models, reversed(models))
    ]
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = [(name, facts[0].get(name), facts[1].get(name)) for name in names]
    return Comparison(
        first=_reference(models[0]),
        second=_reference(models[1]),
        differences=[Difference(name=n, first=a, second=b) for n, a, b in pairs if a != b],
    )


def _model(registry: Registry, name: str) -> Expert | None:
    """The version of an expert; None for the seed."""
    if name == SEED:
        return None
    return registry.expert(*parse_reference(name)) if "@" in name else registry.expert(name)


def _reference(model: Expert | None) -> str:
    return model.reference if model else SEED


def _facts(run: Run, registry: Registry, model: Expert | None) -> Iterator[tuple[str, Any]]:
    folder = model.directory(run.directory) if model else run.seed
    hashes = model.sha256 if model else registry.seed_sha256
    if model:
        record = {key: value for key, value in model.to_json().items() if key not in _HIDDEN}
        yield from _flat(record)
    else:
        yield "languages", " ".join(run.languages)
        if (folder / METRICS).exists():
            yield "tokens", trained_tokens(folder)
    yield "bytes on disk", _size(folder)
    for file, digest in hashes.items():
        if file.endswith(".safetensors"):
            yield f"SHA-256 of {file}", digest


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name -> value of nested records, with names such as "data.sv.sv-v2.documents"."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            yield f"{prefix}{key}", " ".join(value)
        elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            for each in value:  # texts and sources of `provenance`, by name
                named = str(each.get("text") or each.get("source"))
                yield from _flat(each, f"{prefix}{key}.{named}.")
        else:
            yield f"{prefix}{key}", value


def _figures(model: Expert | None, other: Expert | None) -> dict[str, float]:
    own, others = _evaluation(model), _evaluation(other)
    found = {}
    for tag in dict.fromkeys([*own, *others]):
        if tag in own:
            value = own[tag]["expert"]
        elif other and _reference(model) == other.parent:
            value = others[tag].get("parent")
        else:
            value = others[tag].get("seed") if model is None else None
        if value is not None:
            found[f"bits a byte in {tag}"] = value
    return found


def _evaluation(model: Expert | None) -> Mapping[str, Mapping[str, float]]:
    evaluation = model.evaluation or {} if model else {}
    return {**evaluation.get("others", {}), **evaluation.get("own", {})}
