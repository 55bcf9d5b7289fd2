"""What a corpus is: its parts, their languages, its fingerprint, and what a reading found.

How a corpus is described is in `sources`, which files it has in `listing`, how a part is read in
`texts` and `formats`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.corpus import AnyCorpus, Corpus, Source
from xelm.data.corpus_files import OTHER_LANGUAGE, UNKNOWN_LANGUAGE, list_files
from xelm.data.hub import SCHEME, Address
from xelm.data.parts import Document, Part, Survey, no_documents, tag_of
from xelm.data.path_names import code_in, is_other_split, language_in
from xelm.data.records import stem
from xelm.data.unusable import UnusableRecords


@dataclass(slots=True)
class Contents:
    """What is read of a corpus, and what is not."""

    parts: list[Part] = field(default_factory=list)
    """Files and data sets, each of which can be read by itself."""
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    """Why files are skipped -> their names, or their languages where that is why."""
    nameless: list[str] = field(default_factory=list)
    """Files of which neither names nor records say the language."""
    corpus: str = ""
    """For people."""

    def check(self) -> None:
        """Raises UserError for files of which nothing says the language, and for languages all of
        whose files have no bytes."""
        if self.nameless:
            raise _no_language(self.corpus, self.nameless)
        _refuse_empty(self.parts)

    def parts_of(self, languages: Sequence[str]) -> list[Part]:
        """The parts that may have text in one of these languages."""
        return [
            texts
            for texts in self.parts
            if texts.name not in self.nameless and (not texts.named or texts.language in languages)
        ]

    def first_documents(
        self, languages: Sequence[str], count: int, faults: UnusableRecords
    ) -> Iterator[Document]:
        """The first `count` usable documents in each of these languages, in the order of the parts.

        Each part is read once for all languages together, and no further than they need. Unusable
        records on the way are counted in `faults`.
        """
        missing = dict.fromkeys(languages, count)
        for texts in self.parts_of(languages):
            here = [texts.language] if texts.named else languages
            wanted = {tag for tag in here if tag and missing[tag]}
            documents = texts.documents(faults)
            while wanted and (document := next(documents, None)):
                tag = document.language
                if tag not in wanted:
                    continue
                missing[tag] -= 1
                if not missing[tag]:
                    wanted.remove(tag)
                yield document

    def fingerprint(self, languages: Sequence[str]) -> str:
        """The same as `fingerprint` of the corpus for these languages, without planning again."""
        parts = self.parts_of(languages)
        return fingerprint_of(parts, [part.digest() for part in parts])

    def add(self, texts: Part) -> None:
        """Adds a part, unless it is of a language that is not wanted."""
        if texts.named and texts.wanted is not None and texts.language not in texts.wanted:
            self.pass_over(texts.language or texts.name, OTHER_LANGUAGE)
        else:
            self.parts.append(texts)

    def pass_over(self, name: str, reason: str) -> None:
        """Records a file that is skipped."""
        self.passed_over.setdefault(reason, []).append(name)


def contents_of(corpus: AnyCorpus, languages: Sequence[str] | None = None) -> Contents:
    """What is read of a corpus for these languages, and which files are passed over and why.

    Files whose names are other languages are not read; those whose names are none are read if their
    records say the language. UserError for a corpus without files, or without one of the languages.
    """
    corpus = Corpus.of(corpus)
    found = Contents(corpus=str(corpus))
    for source in corpus.sources:
        if source.path.startswith(SCHEME):
            _plan_hub(found, source, languages)
        else:
            _plan_files(found, source, languages)
    if languages is not None:
        if all(texts.named for texts in found.parts):
            tags = {texts.language for texts in found.parts}
            missing = [language for language in languages if language not in tags]
            if missing:
                raise UserError(f"{corpus} has no file of {', '.join(missing)}")
        _refuse_empty(found.parts)
    return found


def _plan_files(found: Contents, source: Source, languages: Sequence[str] | None) -> None:
    listing = list_files(source)
    for reason, names in listing.passed_over.items():
        found.passed_over.setdefault(reason, []).extend(names)
    alone = Path(source.path).is_file()
    agreeing: dict[tuple[Path, str | None], bool] = {}
    for file in listing.files:
        texts = Part(file.path, file.language, languages, file.name, source)
        unnamed = replace(texts, language=None, named=False)
        if source.language or (file.language and not alone and not file.by_folder):
            found.add(texts)
        elif file.language:
            # A folder may be called anything, and a file that is given by itself may hold many
            # languages: their records know better. One file speaks for those beside it.
            group = (file.path.parent, file.language)
            if group not in agreeing:
                said = unnamed.first_language()
                agreeing[group] = said is None or (not alone and _agree(said, file.language))
            found.add(texts if agreeing[group] else unnamed)
        elif unnamed.first_language() is not None:
            found.add(unnamed)
        elif languages is not None:
            found.pass_over(file.name, UNKNOWN_LANGUAGE)
        else:
            found.nameless.append(file.name)
            found.add(replace(unnamed, language=stem(file.path.name)))


def _plan_hub(found: Contents, source: Source, languages: Sequence[str] | None) -> None:
    address = Address.of(source.path).pinned()
    configs = [address.config] if address.config else address.configs()
    tags = {name: tag for name in configs if (tag := _language_of_config(source, name))}
    training = [name for name in tags if not is_other_split(name)] or list(tags)
    for name in training:
        here = str(replace(address, config=name))
        found.add(Part(here, tags[name], languages, here, source))
    if tags:
        return
    if len(configs) > 1 and "default" not in configs:
        more = f" and {len(configs) - 5} more" if len(configs) > 5 else ""
        raise UserError(
            f"no configuration of {source.path} has the name of a language; name one of "
            f"{', '.join(configs[:5])}{more}, as in {replace(address, config=configs[0])}"
        )
    found.add(Part(str(address), None, languages, str(address), source, named=False))


def _language_of_config(source: Source, name: str) -> str | None:
    if source.language:
        return canonical(source.language)
    for key in (name, code_in(name)):
        if key in source.languages:
            code = source.languages[key]
            return code and canonical(code)
    return language_in(name)


def _agree(said: str, tag: str) -> bool:
    """Whether two tags are of one language, of which one may say more, as `sr` and `sr-Latn`; and
    whatever is no tag speaks against none."""
    if tag_of(said) is None:
        return True
    return said == tag or said.startswith(f"{tag}-") or tag.startswith(f"{said}-")


def _refuse_empty(parts: Sequence[Part]) -> None:
    """Raises UserError for languages all of whose files have no bytes."""
    empty: dict[str, bool] = {}
    for texts in parts:
        if texts.language and isinstance(texts.where, Path):
            size = texts.where.stat().st_size
            empty[texts.language] = empty.get(texts.language, True) and not size
        elif texts.language:
            empty[texts.language] = False
    silent = [texts for texts in parts if empty.get(texts.language or "")]
    if silent:
        names = ", ".join(dict.fromkeys(texts.name for texts in silent[:5]))
        tags = ", ".join(dict.fromkeys(texts.language or "" for texts in silent))
        raise UserError(f"the corpus has no text in {tags}: {names} has 0 bytes")


def parts(corpus: AnyCorpus, languages: Sequence[str] | None = None) -> list[Part]:
    """What a corpus consists of, each of which can be read by itself; as `contents_of`."""
    return contents_of(corpus, languages).parts


def languages_of(corpus: AnyCorpus) -> list[str]:
    """Canonical tags of the languages of a corpus, each once: those that names say, in the order of
    the files, and those of files whose records say it, which are read for that.

    UserError for files of which neither says it, and for a data set of the Hub that would
    have to be read whole.
    """
    corpus = Corpus.of(corpus)
    for source in corpus.sources:
        if source.path.startswith(SCHEME) and not _says_language(source):
            raise UserError(f"name the languages to take from {source.path} with --languages")
    found = contents_of(corpus)
    found.check()
    tags: list[str] = []
    faults = UnusableRecords()
    for texts in found.parts:
        if texts.named and texts.language:
            tags.append(texts.language)
        else:
            survey = Survey.of(texts)
            tags += survey.documents
            faults.include(survey.faults)
    if not tags:
        raise no_documents([], faults)
    return list(dict.fromkeys(tags))


def _says_language(source: Source) -> bool:
    config = Address.of(source.path).config
    return bool(source.language or (config and _language_of_config(source, config)))


def _no_language(corpus: str, names: Sequence[str]) -> UserError:
    """The mistake of files of which nothing says the language."""
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


def fingerprint(corpus: AnyCorpus, languages: Sequence[str] | None = None) -> str:
    """SHA-256 over names and contents of the corpus files that `read` would read and over how they
    are read, and over the addresses of Hub data sets with their commits."""
    found = parts(corpus, languages)
    return fingerprint_of(found, [part.digest() for part in found])


def fingerprint_of(parts: Sequence[Part], digests: Sequence[bytes]) -> str:
    """The fingerprint of a corpus of these parts, with these digests."""
    whole = hashlib.sha256()
    for part, digest in zip(parts, digests):
        if isinstance(part.where, Path):
            whole.update(part.name.encode() + b"\0")
        options = part.source.options()
        if part.language and language_in(stem(part.name.rpartition("/")[2])) != part.language:
            options["language"] = part.language  # by a folder, which may be that of the corpus
        if options:
            whole.update(json.dumps(options, sort_keys=True).encode() + b"\0")
        whole.update(digest)
    return whole.hexdigest()
