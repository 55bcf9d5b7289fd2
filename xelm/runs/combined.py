"""Models for all languages that are made of a RUN's experts: how one is begun, what it was made
of, and how it joins the RUN, with its card, its event in the history, and the hashes of its files.
After that it is one of `Run.combined`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, remove_unfinished, sha256, write_json
from clustering.files import replace as replace_file
from experts import manifest
from experts.card import combined_card
from experts.expert import is_name, is_reference, parse_reference
from experts.history import Event
from experts.lock import locked, record
from experts.manifest import MERGES
from experts.merge import read_record
from experts.registry import Registry
from experts.verify import hash_directory
from xelm.data.rows import LanguageShare
from xelm.models.checkpoint import README
from xelm.runs.origin import origin_facts
from xelm.runs.run import Run
from xelm.settings import differences
from xelm.training.metrics import HELD_OUT, METRICS, best, read_metrics, trained_tokens

RECIPE = "recipe.json"
"""File of a distilled model or of a mixture of experts that says how it was made."""


def check_model_name(name: str, kind: str) -> None:
    """Raises UserError unless `name` is a safe folder name. kind: of model, for the message."""
    if not is_name(name):
        raise UserError(
            f"{name!r} cannot name a {kind}: use up to 100 letters a-z or A-Z, digits, '-', '_' "
            "and '.', with no '-' or '.' in front"
        )


@contextmanager
def making(run: Run, place: str) -> Iterator[None]:
    """Context in which no other process makes the model of the folder `place` of a RUN; UserError
    if it is there already."""
    with locked(run.directory, f"train-{run.training(place).name}"):
        if place in run.combined():
            raise UserError(f"{run.directory / place} exists already; nothing is overwritten")
        yield


def begin(run: Run, place: str, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe of a model that is to be trained; where that has begun, UserError unless it
    began with the same recipe, but for the settings of `runtime`."""
    path = run.training(place) / RECIPE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, recipe)
    begun = read_json(path)
    others = [d for d in differences(begun, recipe) if not d.startswith("config.runtime.")]
    if others:
        raise UserError(
            f"{place} was begun otherwise ({'; '.join(others[:3])}); go on as it began, or give it "
            f"up with: xelm discard {run.directory} {place}"
        )


def made_of(run: Run, registry: Registry, place: str) -> tuple[str, ...]:
    """What a model of `Run.combined` was made of: experts NAME@vN, by the names that they have now,
    "seed", "dense", other models of `Run.combined`, and directories; empty if its record is
    damaged."""
    directory, names = run.directory / place, list[str]()
    with suppress(UserError, KeyError, TypeError):
        if place.startswith(f"{MERGES}/"):
            names = [str(each["name"]) for each in read_record(directory)["sources"]]
        else:
            names = [str(each) for each in read_json(directory / RECIPE)["made_of"]]
    made = [n for n, event in enumerate(registry.history) if event.facts.get("model") == place]
    later = registry.history[made[-1] if made else 0 :]
    return tuple(_name_now(later, name) if is_reference(name) else name for name in names)


def _name_now(events: Sequence[Event], reference: str) -> str:
    name, version = parse_reference(reference)
    for event in events:
        name = event.renamed.get(name, name)
    return f"{name}@v{version}"


def join(
    run: Run, place: str, sources: Sequence[LanguageShare], introduction: str, action: str
) -> None:
    """Adds a model that was trained, and written to the folder `place` of a RUN, to its models.
    sources: text that it was trained on. introduction: first paragraph of its card. action: of the
    event. If this is interrupted, it can be done again."""
    directory = run.directory / place
    readme = directory / README
    readme.unlink(missing_ok=True)
    remove_unfinished(readme)
    recipe = read_json(directory / RECIPE)
    tokens = trained_tokens(directory) if (directory / METRICS).exists() else 0
    files = hash_directory(directory)
    found = best(read_metrics(directory / HELD_OUT)) or {}
    bits = {
        tag: f"{value:.3f} bits a byte" for tag, value in found.get("bits_per_byte", {}).items()
    }
    facts: dict[str, Any] = {
        **origin_facts(run),
        "made of": ", ".join(recipe["made_of"]),
        "tokens of training": f"{tokens:,}",
        **{f"held-out text in {tag}": value for tag, value in bits.items()},
    }
    languages = list(dict.fromkeys(source.ids.language for source in sources))
    page = combined_card(place, introduction, languages, facts, files)
    replace_file(readme, lambda file: file.write(page.encode()))
    # The card names the hashes of all other files.
    facts = {"model": place, "card": sha256(readme)}
    if all(event.facts.get("card") != facts["card"] for event in run.registry().history):
        record(run.directory, action, (), facts)
    manifest.record(run.directory, [place], again=True)
