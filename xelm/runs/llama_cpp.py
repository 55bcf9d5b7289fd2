"""llama.cpp's converter and its reader of GGUF files, each in a process of its own: neither is part
of xelm, and a crash of theirs ends nothing here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clustering.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
PLACE = "LLAMA_CPP"
"""Environment variable with the path of the converter, or of the folder that it is in."""
READER = (sys.executable, "-m", "xelm.runs.gguf_reader")
"""Command that answers `Questions` on its stdin about the GGUF file that follows it."""
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What llama.cpp is to do with a GGUF file."""

    texts: Sequence[str]
    """Texts whose ids are wanted, with the special tokens that llama.cpp puts around a text."""
    prompts: Sequence[Sequence[int]]
    """Ids to be continued, each time by the likeliest token."""
    new_tokens: int
    """Most tokens of a continuation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What llama.cpp did with a GGUF file."""

    ids: list[list[int]]
    """Ids of each text."""
    continuations: list[list[int]]
    """New ids of each prompt, with the end token if there was one."""


def find_converter(given: str | Path | None) -> tuple[str, ...]:
    """The command that runs the converter: the file that is given or that lies in the given folder,
    else in that of the environment variable `PLACE`, else the one on PATH."""
    place = given or os.environ.get(PLACE)
    if place:
        path = Path(place) / CONVERTER if Path(place).is_dir() else Path(place)
        if not path.is_file():
            raise UserError(f"there is no converter {path}; wanted llama.cpp's {CONVERTER}")
        return sys.executable, str(path)
    found = shutil.which(CONVERTER)  # an installed one, which has a Python of its own
    if found is None:
        raise UserError(
            f"llama.cpp's {CONVERTER} is not installed: get https://github.com/ggml-org/llama.cpp "
            f"and name its folder with --converter or {PLACE}, or put the script on PATH"
        )
    return (found,)


def check_reader() -> None:
    """Raises UserError if the library that reads GGUF files is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "a GGUF file is checked with xllamacpp, which is not installed; "
            "run: pip install 'xelm[gguf]'"
        )


def convert(
    converter: Sequence[str], checkpoint: Path, file: Path, *, dtype: str, name: str
) -> None:
    """Writes a checkpoint as a GGUF file. dtype: of its weights. name: of the model, in the file.
    UserError if that fails."""
    command = [*converter, str(checkpoint), "--outfile", str(file), "--outtype", _TYPES[dtype]]
    command += ["--model-name", name]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if ended.returncode or not file.is_file():
        raise UserError(f"{converter[-1]} did not convert {checkpoint}: {_reason(ended)}")


def read(file: Path, questions: Questions) -> Answers:
    """What llama.cpp answers about a GGUF file; UserError if it cannot read it."""
    ended = subprocess.run(
        [*READER, str(file)],
        input=json.dumps(asdict(questions)),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise UserError(f"llama.cpp cannot read the GGUF file: {_reason(ended)}")
    # The library may print before the answers.
    return Answers(**json.loads(ended.stdout.splitlines()[-1]))


def _reason(ended: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a process printed as it failed."""
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with code {ended.returncode}"
