"""The files that travel with a checkpoint's weights: tokenizer, chat templates, generation settings
and licence. None of them is run or interpreted here."""

import shutil
from pathlib import Path

from clustering.hub_files import LICENCES, TEMPLATES

# Files that a checkpoint needs besides config.json and weights; every expert gets copies of them.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("tekken.json", "sentencepiece.bpe.model", "added_tokens.json", "vocab.json", "merges.txt"),
    *("vocab.txt", "chat_template.jinja", "generation_config.json"),
)


def companions(directory: str | Path) -> list[str]:
    """Paths relative to `directory` of the files that travel with its weights, sorted."""
    directory = Path(directory)
    names = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    names |= {f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*.jinja")}
    found = directory.iterdir() if directory.is_dir() else ()
    names |= {p.name for p in found if p.name.lower().startswith(LICENCES) and p.is_file()}
    return sorted(names)


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copies the files that travel with a checkpoint's weights into the folder `target`."""
    for name in companions(source):
        (Path(target) / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source) / name, Path(target) / name)
