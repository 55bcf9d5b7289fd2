"""What the tests of whole RUNs share."""

import errno
import importlib.util
import json
import os
from pathlib import Path

import pytest

LANGUAGES = ("en", "de", "es", "fr")
NAMES = {"en-es": ("en", "es"), "de-fr": ("de", "fr")}

# What `xelm init` needs beside a corpus, in the folder `place`: a seed, and rows it can read.
SEED = ["--seed", "run/seed"]
for part in ("experts", "grow"):
    SEED += ["--set", f"{part}.sequence_length=32"]


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or "LLAMA_CPP" not in os.environ,
    reason="needs xllamacpp, and llama.cpp's converter in LLAMA_CPP",
)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but the locks, which are nobody's data."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def without_routers(files: dict[str, bytes]) -> dict[str, bytes]:
    """A snapshot without what is fitted again whenever experts are published."""
    return {name: content for name, content in files.items() if not name.startswith("routers/")}


def documents_of(corpus: Path, language: str) -> list[str]:
    lines = (corpus / f"{language}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def full(*arguments, **options):
    """Stands for whatever writes, on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")
