"""A RUN: one X-ELM on disk. Its paths and readers; the commands that change it are elsewhere."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.engines import Engine
from clustering.errors import UserError
from clustering.files import read_arrays, read_json, write_json
from clustering.languages import canonical_all
from clustering.vectoriser import Vectoriser
from experts.history import command_line
from experts.manifest import COMBINED, recorded
from experts.registry import Registry
from xelm.config import RunConfig, StartToken
from xelm.settings import differences, from_json, override, to_json

if TYPE_CHECKING:
    from xelm.data.store import Store, TokenizedLanguage
    from xelm.data.tokenizer import Tokenizer

_SHOWN_LANGUAGES = 8

FORMAT = 3
"""Format of run.json; 1 had flat settings of trainings, 2 held no text out."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Run:
    """One X-ELM: its paths as attributes, and methods that read what lies there now."""

    directory: Path
    """The RUN."""
    record: Mapping[str, Any]
    """run.json."""
    settings: Sequence[str] = ()
    """Such as "experts.runtime.dtype=bfloat16", for now in place of what run.json says."""

    def __repr__(self) -> str:
        count = len(self.languages)
        shown = ", ".join(self.languages[:_SHOWN_LANGUAGES])
        more = f", {count - _SHOWN_LANGUAGES} more" if count > _SHOWN_LANGUAGES else ""
        return f"<Run {self.directory}: {count} languages: {shown}{more}>"

    @property
    def config(self) -> RunConfig:
        """The full configuration; UserError if it is of a version with other fields."""
        try:
            config = from_json(RunConfig, self.record["config"])
        except UserError as error:
            made = f"made by xelm {self.record.get('xelm')}"
            raise UserError(f"{self.directory / 'run.json'}, {made}: {error}") from error
        return override(config, self.settings) if self.settings else config

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of the RUN's corpus, as canonical tags."""
        return tuple(self.record["languages"])

    @property
    def seed(self) -> Path:
        """The seed's checkpoint."""
        return self.directory / "seed"

    @property
    def dense(self) -> Path:
        """The dense baseline's checkpoint, if it was trained."""
        return self.directory / "dense"

    @property
    def results(self) -> Path:
        """Directory of results.json, figures and report."""
        return self.directory / "results"

    def combined(self) -> dict[str, Path]:
        """Name and checkpoint of each model of the RUN that is made of several experts: merged
        ("merges/NAME"), distilled ("students/NAME") or a mixture of experts ("mixes/NAME")."""
        known = {"/".join(file.split("/")[:2]) for file in recorded(self.directory)}
        places = sorted(place for place in known if place.split("/")[0] in COMBINED)
        return {name: self.directory / name for name in places if (self.directory / name).exists()}

    def training(self, name: str) -> Path:
        """Checkpoints and metrics of an unfinished training. name: of an expert or of a model of
        `combined`, whose slash no expert's name can have."""
        return self.directory / "train" / name.replace("/", "+")

    def logs(self, target: Path) -> Path:
        """Directory for TensorBoard and Weights & Biases, for the training of a checkpoint."""
        return self.directory / "logs" / target.relative_to(self.directory)

    def failure(self, name: str) -> Path:
        """File with the reason why a training failed, until it is tried again."""
        return self.training(f"{name}.failed.txt")

    def registry(self) -> Registry:
        """The registry of the experts."""
        return Registry.load(self.directory)

    def untrained(self) -> list[str]:
        """Names of the experts of clusters that are not trained yet."""
        training = self.registry().training()
        return [e.name for e in training if e.cluster is not None and e.made is None]

    def clusters(self) -> Clustering:
        """The clusters that the RUN was branched on; UserError before that."""
        if not (self.directory / "clusters.json").exists():
            raise UserError(
                f"{self.directory} has no clusters yet; run: "
                f"xelm branch {self.directory} --clusters DIR"
            )
        return Clustering.load(self.directory)

    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer: the seed or, before there is one, its training's folder."""
        return self.seed if (self.seed / "tokenizer.json").exists() else self.training("tokenizer")

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that all models share; loaded again only if one of its files changes."""
        directory = self.tokenizer_directory()
        files = sorted((file.name, file.stat().st_mtime_ns) for file in directory.glob("*"))
        return _load_tokenizer(directory.absolute(), self.config.start_token, tuple(files))

    def context_length(self) -> int:
        """The models' own length, in tokens: that of the seed's config.json or, of a seed that was
        trained here, that of the rows in training. Later positions such a model has never seen."""
        from xelm.models.checkpoint import read_config

        if self.config.model is None:
            return read_config(self.seed).max_length
        return max(self.config.seed.sequence_length, self.config.experts.sequence_length)

    @property
    def has_text(self) -> bool:
        """Whether the tokenised corpus of the RUN is there; a RUN is pulled without it."""
        return (self._corpus / "train" / "store.json").exists()

    def store(self, name: str = "train") -> "Store":
        """The tokenised corpus of the RUN, or one that was added later; UserError if it is not
        there."""
        from xelm.data.store import open_store

        if not (self._corpus / name / "store.json").exists():
            raise UserError(
                f"{self._corpus / name} is not there: this needs the tokenised text, which a RUN "
                "from the Hub does not have"
            )
        return open_store(self._corpus / name)

    def stores(self, languages: Iterable[str] = ()) -> "dict[str, Store]":
        """The tokenised corpus of the RUN, and those that published experts of these languages were
        trained on, as far as they are there, by name."""
        wanted, names = set(languages), ["train"]
        for expert in self.registry().published() if wanted else ():
            names += expert.texts if wanted & set(expert.languages) else ()
        there = [name for name in dict.fromkeys(names) if (self._corpus / name).is_dir()]
        return {name: self.store(name) for name in there}

    def texts(self, languages: Iterable[str]) -> "dict[str, list[TokenizedLanguage]]":
        """Text of these languages in each of their `stores`; languages without any are missing."""
        found: dict[str, list[TokenizedLanguage]] = {}
        languages = list(languages)
        stores = self.stores(languages).values()
        for tag in languages:
            if some := [store.languages[tag] for store in stores if tag in store.languages]:
                found[tag] = some
        return found

    @property
    def _corpus(self) -> Path:
        return self.directory / "corpus"

    def documents(self, languages: Sequence[str] | None = None, engine: Engine = map) -> Documents:
        """The tokenised documents of the RUN's corpus in these languages (None: in all), to be
        clustered. engine: maps a function over parts of them."""
        store = self.store()
        wanted = None if languages is None else canonical_all(languages)
        return Documents(store.parts(store.tags(wanted)), engine=engine)

    def vectoriser(self) -> Vectoriser:
        """TF-IDF over the seed's subword ids."""
        arrays = read_arrays(self.directory / "vectoriser.npz")
        return Vectoriser(idf=arrays["idf"], projection=arrays["projection"])


@functools.lru_cache(maxsize=2)
def _load_tokenizer(directory: Path, start_token: StartToken, _files: object) -> "Tokenizer":
    from xelm.data import tokenizer

    return tokenizer.load(directory, start_token)


def open_run(directory: str | Path, *, finished: bool = True, settings: Sequence[str] = ()) -> Run:
    """The RUN in a directory; one that init has not made whole is refused if `finished`."""
    path = Path(directory) / "run.json"
    if not path.exists():
        raise UserError(f"{directory} is no RUN: it has no run.json; make one with xelm init")
    record = read_json(path, newest_format=FORMAT)
    if record["format"] < FORMAT:
        raise UserError(
            f"{path} is of format {record['format']}, of xelm {record.get('xelm')}, and this xelm "
            f"reads format {FORMAT}; use that version, or make the RUN again with xelm init"
        )
    missing = [key for key in ("config", "languages", "corpus") if key not in record]
    if missing:
        raise UserError(f"{path} lacks {', '.join(map(repr, missing))}")
    # The registry is what init writes last.
    if finished and not (Path(directory) / "registry.json").exists():
        raise UserError(f"init of {directory} did not finish; run the same xelm init again")
    run = Run(directory=Path(directory), record=record, settings=settings)
    if settings:
        _ = run.config  # made to be checked
    return run


def _with_newer_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded configuration, with settings that xelm did not have yet as they are by default."""
    try:
        return to_json(from_json(RunConfig, config))
    except UserError:
        return config


def files_of_run(directory: str | Path) -> set[str]:
    """Names of what is in the directory of a RUN that is to be made or to be resumed; UserError for
    a file, and for a directory that is not empty and is no RUN."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a new or empty directory")
    present = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if present - {".locks"} and "run.json" not in present:
        raise UserError(f"{directory} exists and is no RUN; give a new or empty directory")
    return present


def create_run(directory: str | Path, config: RunConfig, facts: Mapping[str, Any]) -> Run:
    """Makes the directory with its run.json, or opens it if that says the same but for the runtime
    settings of the seed's training. Another configuration in its place is refused."""
    from xelm.version import __version__

    directory, present = Path(directory), files_of_run(directory)
    wanted = {"config": to_json(config), **facts}
    if "run.json" in present:
        run = open_run(directory, finished=False)
        # What a corpus contains counts, not where it lies; the seed's training may be resumed
        # elsewhere and otherwise.
        before = {**run.record, "config": _with_newer_settings(run.record["config"])}
        found = differences(before, {**wanted, "corpus": run.record["corpus"]})
        named = [each.removeprefix("config.") for each in found]
        differ = [each for each in named if not each.startswith("seed.runtime.")]
        if not differ:
            return replace(run, record={**run.record, "config": wanted["config"]})
        # With nothing beside it, it is of a beginning that failed at once, and is begun anew.
        if present - {"run.json", ".locks"}:
            rest = f" (and {len(differ) - 5} more)" if len(differ) > 5 else ""
            raise UserError(
                f"{directory} was begun with other settings: {'; '.join(differ[:5])}{rest}; "
                "use the same again, or another directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    command = command_line()
    record = {"format": FORMAT, "xelm": __version__, "command": command, **wanted}
    write_json(directory / "run.json", record)
    return open_run(directory, finished=False)
