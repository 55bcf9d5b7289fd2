"""Repositories of models on the Hugging Face Hub: their files, commits of several files at once,
and downloads, through `huggingface_hub`.

What its functions raise becomes a UserError of one line that says what to do. The token is the
library's: that of HF_TOKEN, or of `hf auth login`.
"""

import errno
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.hf_api import RepoFile

from clustering.errors import UserError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_LONGEST_NAME = 96
MAIN = "main"
"""Branch that is read and written unless another is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file in a repository."""

    size: int
    """Number of its bytes."""
    sha256: str | None
    """Hexadecimal SHA-256 of a large file; None for a file that git has itself."""
    blob: str
    """Git's hash of a file that git has itself."""

    def equals(self, file: Path | bytes, digest: str | None = None) -> bool:
        """Whether this is its content. digest: hexadecimal SHA-256 of `file`, if it is known."""
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        if size != self.size:
            return False
        if self.sha256 is not None:
            return (digest or _sha256(file)) == self.sha256
        content = file if isinstance(file, bytes) else file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % size + content).hexdigest() == self.blob


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository of models at one revision; UserError for an impossible name."""

    name: str
    """OWNER/REPO."""
    revision: str = MAIN
    """Branch, tag or commit."""

    def __post_init__(self):
        bad = "--" in self.name or ".." in self.name or self.name.endswith(".git")
        if bad or not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise UserError(
                f"a repository is OWNER/REPO, such as jane/my-experts; got {self.name!r}"
            )

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"

    @property
    def url(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/{self.name}"

    def commit(self) -> "Commit | None":
        """The commit that its revision is now; None if there is no such repository or revision, or
        none that this user may see."""
        with self._failing("read"):
            try:
                info = HfApi().model_info(self.name, revision=self.revision)
                tree = HfApi().list_repo_tree(self.name, recursive=True, revision=info.sha)
                files = {file.path: _remote(file) for file in tree if isinstance(file, RepoFile)}
            except errors.RevisionNotFoundError:
                return None
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return None
        assert info.sha is not None
        return Commit(sha=info.sha, private=bool(info.private), files=files)

    def exists(self) -> bool:
        """Whether there is such a repository, at any revision, which this user may see."""
        with self._failing("read"):
            return HfApi().repo_exists(self.name)

    def create(self, *, private: bool) -> None:
        """Makes the repository, and the branch, unless they are there."""
        with self._failing("create"):
            HfApi().create_repo(self.name, private=private, exist_ok=True)
            if self.revision != MAIN:
                HfApi().create_branch(self.name, branch=self.revision, exist_ok=True)

    def write(
        self,
        files: Mapping[str, Path | bytes],
        deleted: Iterable[str],
        *,
        message: str,
        parent: str,
    ) -> str:
        """Adds or replaces files and deletes others in one commit, and returns its hash; UserError
        if the branch is not at the commit `parent` any more."""
        adds = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
            for name, file in files.items()
        ]
        deletes = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in deleted]
        with self._failing("write"):
            self._upload(adds)
            done = HfApi().create_commit(
                self.name,
                [*adds, *deletes],
                commit_message=message,
                revision=self.revision,
                parent_commit=parent,
            )
        return done.oid

    def _upload(self, adds: list[CommitOperationAdd]) -> None:
        """Uploads the content of large files, which the next commit refers to: through Xet where
        `hf_xet` is installed and the host has it, otherwise by HTTP."""

        def upload() -> None:
            HfApi().preupload_lfs_files(self.name, adds, revision=self.revision, free_memory=False)

        try:
            upload()
        except errors.HfHubHTTPError:
            raise  # an answer of the host
        except Exception as error:  # hf_xet raises built-in exceptions of several kinds
            if constants.HF_HUB_DISABLE_XET:
                raise
            print(
                f"Xet does not take the files ({first_line(error)}); they are uploaded by HTTP",
                file=sys.stderr,
            )
            with _without_xet():
                upload()

    def download(self, commit: str, names: Iterable[str], folder: Path) -> None:
        """Downloads files of a commit into a folder, under their paths. What an interrupted
        download left in the folder is not downloaded again."""
        # Patterns of the library are those of a shell.
        patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
        with self._failing("read"):
            try:
                huggingface_hub.snapshot_download(
                    self.name, revision=commit, local_dir=folder, allow_patterns=patterns
                )
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"the disk is full; what was downloaded is kept in {folder}, and the same "
                    "command goes on with it"
                ) from error

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turns every error, of the network or of the library, into a UserError."""
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise UserError(f"cannot {what} {self}: {_reason(error)}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One commit of a repository."""

    sha: str
    """Hash of the commit."""
    private: bool
    """Whether the repository is private."""
    files: Mapping[str, RemoteFile]
    """Its files, by path."""


def require_token() -> None:
    """Raises UserError unless the user is logged in."""
    if huggingface_hub.get_token() is None:
        raise UserError(
            "writing to the Hub needs a token: log in with hf auth login, or set HF_TOKEN (make "
            f"one with the right to write at {constants.ENDPOINT}/settings/tokens)"
        )


@contextmanager
def _without_xet() -> Iterator[None]:
    """Context in which the library uploads by HTTP, as with HF_HUB_DISABLE_XET."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _remote(file: RepoFile) -> RemoteFile:
    large = file.lfs.sha256 if file.lfs is not None else None
    return RemoteFile(size=file.size, sha256=large, blob=file.blob_id)


def _sha256(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """Why a call of the library failed, in one line, and what helps."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for one in chain:
        if isinstance(one, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and so nothing is read from the network"
        if isinstance(one, errors.GatedRepoError):
            return "it is gated; ask for access on its page, and log in with hf auth login"
        if isinstance(one, errors.HfHubHTTPError) and one.response is not None:
            return _of_status(one)
        # Of the library's HTTP client, or of the socket below it.
        if type(one).__module__.startswith("http") or isinstance(one, ConnectionError):
            return f"{constants.ENDPOINT} does not answer ({first_line(one)})"
    lines = dict.fromkeys(first_line(one) for one in (error, chain[-1]))
    return ": ".join(line.rstrip(".:") for line in lines)


def _of_status(error: errors.HfHubHTTPError) -> str:
    status, login = error.response.status_code, "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if status == 401:
        return f"there is no such repository, or the token is missing or not valid; {login}"
    if status == 404:
        return f"there is no such repository, or it is private; {login}"
    if status == 403:
        return "the token has no right to do this; take one with the right to write there"
    if status in (409, 412):
        return "it was changed at the same time; nothing was written; run this again"
    if status == 429:
        return "the Hub wants fewer requests; run this again later"
    message = error.server_message or first_line(error)
    return f"the Hub answered {status}: {' '.join(message.split())}"
