"""Names of clusters, which become names of experts and of their folders."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from clustering.errors import UserError

_NAME = re.compile(r"[^\W_][\w.-]*")
_MOST_LANGUAGES = 4
"""Number of languages that a name spells out at most."""
_MOST_LETTERS = 24
"""Number of letters of such a name at most."""


def name_clusters(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Clusters named by their languages in the given order, as in `en-es`.

    A group of more than four languages, or with a name above 24 letters, is named by its first
    language and a count: `en-plus7`. Names can be names of folders, and differ in more than case.
    """
    named: dict[str, tuple[str, ...]] = {}
    taken: dict[str, int] = {}
    for members in groups:
        name = "-".join(members)
        too_long = len(members) > _MOST_LANGUAGES or len(name) > _MOST_LETTERS
        if too_long and len(members) > 1:
            name = f"{members[0]}-plus{len(members) - 1}"
        # On file systems that ignore case, pt-BR alone and pt with br would share a folder.
        times = taken[name.casefold()] = taken.get(name.casefold(), 0) + 1
        named[name if times == 1 else f"{name}_{times}"] = tuple(members)
    return named


def check_cluster_names(names: Collection[str]) -> None:
    """Raises UserError unless there are names, all fit for a folder and different from each
    other."""
    if not names:
        raise UserError("a clustering must have at least one cluster; got none")
    # A name must not climb out of the experts' folder or be hidden in it.
    bad = [name for name in names if not _NAME.fullmatch(name)]
    if bad:
        raise UserError(
            "cluster names must consist of letters, digits, '_', '.' and '-', and begin with a "
            f"letter or digit; got {bad[:5]}"
        )
    if len({unicodedata.normalize("NFC", name).casefold() for name in names}) < len(names):
        raise UserError(f"cluster names must differ in more than case; got {', '.join(names)}")
