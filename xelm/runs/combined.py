"""A model for all languages that was made of a RUN's experts joins the RUN: its card, its event in
the history, and the hashes of its files. After that it is one of `Run.combined`."""

from collections.abc import Sequence
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, remove_unfinished, sha256
from clustering.files import replace as replace_file
from experts import manifest
from experts.card import combined_card
from experts.expert import is_name
from experts.lock import record
from experts.verify import hash_directory
from xelm.data.rows import LanguageShare
from xelm.models.checkpoint import README
from xelm.runs.origin import origin_facts
from xelm.runs.run import Run
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
