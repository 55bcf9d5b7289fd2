"""Data sets of the Hugging Face Hub as corpora: their addresses, configurations and records.

Records are streamed with `datasets`. All of them belong to one commit, which is looked up once and
is part of the address from then on, so that a RUN names exactly the text that it was made from.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clustering.errors import UserError, first_line

SCHEME = "hf://"
_FORM = "hf://owner/dataset[@revision][/config][:split]"
_ADDRESS = re.compile(
    r"(?P<dataset>[^/:@]+/[^/:@]+)(@(?P<revision>[^/:@]+))?(/(?P<config>[^/:]+))?(:(?P<split>[^/:]+))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Address of one configuration and split of a data set, at a revision."""

    dataset: str
    revision: str | None = None
    """A commit, branch or tag; None is the newest of the main branch."""
    config: str | None = None
    split: str | None = None
    """None is "train"."""

    @staticmethod
    def of(name: str) -> "Address":
        """The address that a name of this form says; UserError for other names."""
        found = _ADDRESS.fullmatch(name.removeprefix(SCHEME))
        if found is None:
            raise UserError(f"a Hub corpus is {_FORM}; got {name}")
        return Address(**found.groupdict())

    def __str__(self) -> str:
        parts = zip("@/:", (self.revision, self.config, self.split))
        return SCHEME + self.dataset + "".join(mark + part for mark, part in parts if part)

    def pinned(self) -> "Address":
        """The address at its revision's newest commit; UserError if the Hub does not answer."""
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self
        # `datasets` would silently read a folder of that name instead.
        if Path(self.dataset).exists():
            raise UserError(
                f"{self} is a data set of the Hub, but there is a folder {self.dataset} here; "
                f"give --corpus {self.dataset} to read that"
            )
        import huggingface_hub

        with _failing(f"cannot open {self}"):
            found = huggingface_hub.HfApi().dataset_info(self.dataset, revision=self.revision)
        return replace(self, revision=found.sha)

    def configs(self) -> list[str]:
        """Names of the configurations of the data set; UserError if the Hub does not answer."""
        import datasets

        with _failing(f"cannot open {self}"):
            return datasets.get_dataset_config_names(self.dataset, revision=self.revision)


def records(name: str) -> Iterator[tuple[str, Any]]:
    """Every record of a data set with its place; UserError if the stream breaks before its end."""
    import datasets

    address = Address.of(name)
    config = [address.config] if address.config else []
    revision = {"revision": address.revision} if address.revision else {}
    with _failing(f"cannot open {name}"):
        found = datasets.load_dataset(
            address.dataset, *config, split=address.split or "train", streaming=True, **revision
        )
    number = 0
    try:
        for number, record in enumerate(found, 1):
            yield f"{name}:{number}", record
    except Exception as error:
        # Otherwise the corpus would be what came before the connection broke.
        raise UserError(f"cannot read {name} after record {number}: {first_line(error)}") from error


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns every error, of the network or a library, into a UserError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error
