"""Data sets of the Hugging Face Hub as corpora: their addresses, configurations and records.

Records are streamed by `datasets`. What is read belongs to one commit, which is looked up once and
stands in the address from then on, so that a RUN names the very text it was made of.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clustering.errors import UserError

SCHEME = "hf://"
_FORM = "hf://owner/dataset[@revision][/config][:split]"
_ADDRESS = re.compile(
    r"(?P<dataset>[^/:@]+/[^/:@]+)(@(?P<revision>[^/:@]+))?(/(?P<config>[^/:]+))?(:(?P<split>[^/:]+))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Names one configuration and split of a data set, at a revision."""

    dataset: str
    revision: str | None = None
    """A commit, branch or tag; None is the newest of the main branch."""
    config: str | None = None
    split: str | None = None
    """None is "train"."""

    @staticmethod
    def of(name: str) -> "Address":
        """That of `hf://owner/dataset[@revision][/config][:split]`; UserError for other names."""
        found = _ADDRESS.fullmatch(name.removeprefix(SCHEME))
        if found is None:
            raise UserError(f"a Hub corpus is {_FORM}; got {name}")
        return Address(**found.groupdict())

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        config = f"/{self.config}" if self.config else ""
        split = f":{self.split}" if self.split else ""
        return f"{SCHEME}{self.dataset}{revision}{config}{split}"

    def pinned(self) -> "Address":
        """The same at the commit that its revision stands for now; UserError if the Hub does not
        answer."""
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self
        # `datasets` reads a folder of that name in place of the Hub's data set, and says nothing.
        if Path(self.dataset).exists():
            raise UserError(
                f"{self} is of the Hub, but there is a folder {self.dataset} here; "
                f"give --corpus {self.dataset} to read that"
            )
        import huggingface_hub

        try:
            found = huggingface_hub.HfApi().dataset_info(self.dataset, revision=self.revision)
        except Exception as error:
            raise UserError(f"cannot open {self}: {reason(error)}") from error
        return replace(self, revision=found.sha)

    def configs(self) -> list[str]:
        """Names of the configurations of the data set; UserError if the Hub does not answer."""
        import datasets

        try:
            return datasets.get_dataset_config_names(self.dataset, revision=self.revision)
        except Exception as error:
            raise UserError(f"cannot open {self}: {reason(error)}") from error


def records(name: str) -> Iterator[tuple[str, Any]]:
    """Every record of a data set with its place, in order; UserError where it cannot be opened, and
    where it ends before its end."""
    import datasets

    address = Address.of(name)
    config = [address.config] if address.config else []
    revision = {"revision": address.revision} if address.revision else {}
    try:
        found = datasets.load_dataset(
            address.dataset, *config, split=address.split or "train", streaming=True, **revision
        )
    except Exception as error:
        raise UserError(f"cannot open {name}: {reason(error)}") from error
    number = 0
    try:
        for number, record in enumerate(found, 1):
            yield f"{name}:{number}", record
    except Exception as error:
        # Going on would make a corpus of whatever came before the connection broke.
        raise UserError(f"cannot read {name} after record {number}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
