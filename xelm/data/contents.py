"""Contents of a corpus (`corpus`): the parts that are read, their languages, the files that are
skipped, and a hash over all of it. Files are listed in `corpus_files` and read in `parts`."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clustering.errors import UserError
from clustering.languages import canonical, canonical_all
from xelm.data.corpus import AnyCorpus, Corpus, Source
from xelm.data.corpus_files import OTHER_LANGUAGE, UNKNOWN_LANGUAGE, list_files
from xelm.data.data_card import card_of, read_card
from xelm.data.hub import SCHEME, Address
from xelm.data.parts import Document, Part, no_documents, tag_of
from xelm.data.path_names import code_in, is_other_split, language_in
from xelm.data.records import stem
from xelm.data.unusable import UnusableRecords


@dataclass(slots=True)
class Contents:
    """Parts of a corpus that are read, and files that are not."""

    corpus: Corpus
    languages: Sequence[str] | None = None
    """Canonical tags of the languages to read; None means all."""
    parts: list[Part] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Reason -> names of the files skipped for it, or the languages of files in other languages."""
    without_language: list[str] = field(default_factory=list)
    """Files whose language neither their names nor their records say."""
    digests: dict[Path | str, bytes] = field(default_factory=dict)
    """Location -> hash of each part that was hashed before."""

    def check(self) -> None:
        """Raises UserError for files without a language, for languages without any bytes, and for
        broken data cards."""
        if self.without_language:
            raise _no_language(self.corpus, self.without_language)
        _refuse_empty(self.parts)
        cards = {
            card_of(part, tag)
            for part in self.parts
            for tag in ([part.language] if part.named else self.languages or [])
            if tag is not None
        }
        for path in sorted(path for path in cards if path is not None):
            read_card(path)

    def parts_of(self, languages: Sequence[str]) -> list[Part]:
        """The parts that may have text in one of these languages."""
        readable = [part for part in self.parts if part.name not in self.without_language]
        return [part for part in readable if not part.named or part.language in languages]

    def first_documents(
        self, languages: Sequence[str], count: int, unusable: UnusableRecords
    ) -> Iterator[Document]:
        """The first `count` usable documents in each of these languages, in the order of the parts.
        Each part is read once for all languages together, and only until they have enough; unusable
        records up to there are counted in `unusable`."""
        missing = dict.fromkeys(languages, count)
        for part in self.parts_of(languages):
            here = [part.language] if part.named else languages
            wanted = {tag for tag in here if tag and missing[tag]}
            documents = part.all_documents(unusable)
            while wanted and (found := next(documents, None)):
                _, document = found
                tag = document.language
                if tag in wanted:
                    missing[tag] -= 1
                    if not missing[tag]:
                        wanted.remove(tag)
                    yield document

    def fingerprint(self, languages: Sequence[str] | None = None) -> str:
        """SHA-256 over the parts that may have text in these languages (None: all parts): names
        and contents of files, addresses of Hub data sets with commits, and how records are read."""
        whole = hashlib.sha256()
        for part in self.parts if languages is None else self.parts_of(languages):
            if isinstance(part.location, Path):
                whole.update(part.name.encode() + b"\0")
            options = {k: v for k, v in part.source.options().items() if k != "card"}
            if part.language and language_in(stem(part.name.rpartition("/")[2])) != part.language:
                # The name of a folder says the language, which may be the folder of the corpus.
                options["language"] = part.language
            if options:
                whole.update(json.dumps(options, sort_keys=True).encode() + b"\0")
            if part.location not in self.digests:
                self.digests[part.location] = part.digest()
            whole.update(self.digests[part.location])
        return whole.hexdigest()

    def add(self, part: Part) -> None:
        """Adds a part, or skips it if its name says a language that is not to be read."""
        if part.named and part.languages is not None and part.language not in part.languages:
            self.skipped[OTHER_LANGUAGE].append(part.language or part.name)
        else:
            self.parts.append(part)


def contents_of(corpus: AnyCorpus, languages: Sequence[str] | None = None) -> Contents:
    """Contents of a corpus in these languages, given by canonical tags (None: all).

    Files whose names say none are read if their records say the language. UserError for a corpus
    without files, or without a file for one of the languages.
    """
    found = Contents(corpus=Corpus.of(corpus), languages=languages)
    for source in found.corpus.sources:
        if source.path.startswith(SCHEME):
            _add_data_sets(found, source)
        else:
            _add_files(found, source)
    if languages is not None:
        tags = {part.language for part in found.parts}
        missing = [language for language in languages if language not in tags]
        if missing and all(part.named for part in found.parts):
            raise UserError(f"{found.corpus} has no file of {', '.join(missing)}")
        _refuse_empty(found.parts)
    return found


def _add_files(found: Contents, source: Source) -> None:
    files, skipped = list_files(source)
    for reason, names in skipped.items():
        found.skipped[reason] += names
    alone = Path(source.path).is_file()
    agreeing: dict[tuple[Path, str | None], bool] = {}
    for file in files:
        part = Part(file.path, file.language, found.languages, file.name, source)
        by_records = replace(part, language=None, named=False)
        if source.language or (file.language and not alone and not file.by_folder):
            found.add(part)
        elif file.language:
            # A folder may have any name, and a file that is given by itself may contain many
            # languages, so their records decide. One file decides for those beside it.
            group = (file.path.parent, file.language)
            if group not in agreeing:
                first = by_records.first_language()
                agreeing[group] = first is None or (not alone and _agree(first, file.language))
            found.add(part if agreeing[group] else by_records)
        elif by_records.first_language() is not None:
            found.add(by_records)
        elif found.languages is not None:
            found.skipped[UNKNOWN_LANGUAGE].append(file.name)
        else:
            found.without_language.append(file.name)
            found.add(replace(by_records, language=stem(file.path.name)))


def _add_data_sets(found: Contents, source: Source) -> None:
    address = Address.of(source.path).pinned()
    configs = [address.config] if address.config else address.configs()
    tags = {name: tag for name in configs if (tag := _language_of_config(source, name))}
    training = [name for name in tags if not is_other_split(name)] or list(tags)
    for name in training:
        here = str(replace(address, config=name))
        found.add(Part(here, tags[name], found.languages, here, source))
    if tags:
        return
    if len(configs) > 1 and "default" not in configs:
        more = f" and {len(configs) - 5} more" if len(configs) > 5 else ""
        raise UserError(
            f"no configuration of {source.path} has the name of a language; name one of "
            f"{', '.join(configs[:5])}{more}, as in {replace(address, config=configs[0])}"
        )
    found.add(Part(str(address), None, found.languages, str(address), source, named=False))


def _language_of_config(source: Source, name: str) -> str | None:
    if source.language:
        return canonical(source.language)
    for key in (name, code_in(name)):
        if key in source.languages:
            code = source.languages[key]
            return code and canonical(code)
    return language_in(name)


def _agree(named: str, tag: str) -> bool:
    """Whether two tags are of one language, where one may be more precise, as `sr` and `sr-Latn`.
    A name that is no tag contradicts none."""
    if tag_of(named) is None:
        return True
    return named == tag or named.startswith(f"{tag}-") or tag.startswith(f"{named}-")


def _refuse_empty(parts: Sequence[Part]) -> None:
    """Raises UserError for languages all of whose files have no bytes."""
    with_text = {
        part.language
        for part in parts
        if not isinstance(part.location, Path) or part.location.stat().st_size
    }
    empty = [(p.language, p.name) for p in parts if p.language and p.language not in with_text]
    if empty:
        names = ", ".join(dict.fromkeys(name for _, name in empty[:5]))
        tags = ", ".join(dict.fromkeys(tag for tag, _ in empty))
        raise UserError(f"the corpus has no text in {tags}: {names} has 0 bytes")


def languages_of(corpus: AnyCorpus) -> list[str]:
    """Canonical tags of the languages of a corpus, as `contents_in` finds them."""
    return list(contents_in(corpus).languages or ())


def contents_in(corpus: AnyCorpus, languages: Sequence[str] | None = None) -> Contents:
    """Contents of a corpus, at the newest commits of data sets of the Hub, in these languages, or
    else in all that it has: parts whose names say no language are read to find those of their
    records. The result has their canonical tags, each once, in the order of the parts.

    UserError as `contents_of`, for files whose language nothing says, and for a data set of the Hub
    that would have to be read to its end.
    """
    corpus = Corpus.of(corpus)
    if languages is not None:
        return contents_of(corpus.pinned(), canonical_all(languages))
    for source in corpus.sources:
        if source.path.startswith(SCHEME) and not source.language:
            config = Address.of(source.path).config
            if not config or not _language_of_config(source, config):
                raise UserError(f"name the languages to take from {source.path} with --languages")
    found = contents_of(corpus.pinned())
    found.check()
    tags: list[str] = []
    unusable = UnusableRecords()
    for part in found.parts:
        if part.named and part.language:
            tags.append(part.language)
        else:
            tags += dict.fromkeys(document.language for document in part.documents(unusable))
    if not tags:
        raise no_documents([], unusable)
    found.languages = list(dict.fromkeys(tags))
    # A file whose name says a language may have records in further ones.
    found.parts = [replace(part, languages=found.languages) for part in found.parts]
    return found


def _no_language(corpus: Corpus, names: Sequence[str]) -> UserError:
    """The error for files whose language nothing says."""
    folder, _, file = names[0].rpartition("/")
    name = code_in(folder.rpartition("/")[2] or stem(file))
    try:
        canonical(name)
        unknown = f"{name!r} is taken for a word, not for a language code"
    except UserError as error:
        unknown = str(error).partition("; did you mean")[0]
    more = f" (and {len(names) - 1} more: {', '.join(names[1:5])})" if len(names) > 1 else ""
    return UserError(
        f"{unknown}: nothing says the language of {names[0]}{more} of {corpus}; say it in a YAML "
        f"file, '{name}: CODE', or '{name}: null' to leave it out, with --language-map, name the "
        "field of the records that says it with --language-field, or choose with --languages"
    )
