"""What names of files, folders and configurations say: their language, and whether they are a split
for training."""

import re
from functools import cache

from clustering.errors import UserError
from clustering.languages import canonical, is_old_code
from xelm.data.records import stem

# Splits that are not for training are skipped if a data set has others.
MAIN_SPLITS = {"train", "clean"}
OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval", "noisy", "removed"}
# Words that are ignored, besides numbers.
_DATA = """part of shard chunk split file files text texts data corpus c4 mc4 tfrecord meta dedup
deduplicated jsonl json parquet arrow wiki wikipedia oscar madlad cc100 news web sentences"""
_ORDINARY = {*_DATA.split(), *MAIN_SPLITS, *OTHER_SPLITS}
# Words that are codes of small languages (`all` is Allar, `old` Mochi) but mostly mean no language;
# a map of languages can say that they do.
_ENGLISH = """all and art bad bag big bin bio bot box csv day dir doc dup end fun hot hub job key
lab lib log low map max mix mod net old one par pkg pre pub raw rel res row run sci seg sep seq
set src sub sum tab tag tar the tmp top tsv two txt var ver xml yml"""
_NO_LANGUAGE = {*_ORDINARY, *_ENGLISH.split()}
# Codes of small languages that mean no language as a whole name, but do within a longer one, such
# as `20231101.new`.
_WHOLE_NAMES = {"los", "ner", "new", "ted"}
# Words that mean no language as the name of the whole corpus; within it, many corpora have Catalan
# and Burmese under these codes.
WHOLE_CORPUS = {"cat", "my"}


@cache
def language_in(name: str) -> str | None:
    """Canonical tag of the language that a name says: `sw` for `swh_Latn`, `c4-sw.tfrecord-00000`
    or `sw_meta_part_1`; None if any other word is left, as in `notes` or `de-en`."""
    if name.lower() in _WHOLE_NAMES:
        return None
    for code in (name, code_in(name)):
        # Names of another form are no codes, which saves the search for similar ones.
        if is_old_code(code) or re.fullmatch(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*", code):
            if code.lower() in _NO_LANGUAGE:
                return None
            try:
                return canonical(code)
            except UserError:
                continue
    return None


@cache
def code_in(name: str) -> str:
    """The name without the words that are ignored: `als` for `20231101.als` or `als_meta_part_1`;
    the name itself if no word is left."""
    words = [word for word in _words(name) if not re.fullmatch(r"\d+[kKmMbB]?", word)]
    if is_old_code(whole := "-".join(words)):  # such as `map-bms`
        return whole
    return "-".join(word for word in words if word.lower() not in _ORDINARY) or name


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]


def is_other_split(name: str) -> bool:
    """Whether a path or configuration is of a split that is not for training, by its words."""
    return any(
        word in OTHER_SPLITS for part in name.split("/") for word in _words(stem(part).lower())
    )
