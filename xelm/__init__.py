"""xelm: train, grow and ask cross-lingual expert language models (X-ELM).

    from xelm import open_run, load_model, save_model

Importing this package imports nothing heavy; the names are loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from xelm.version import __version__

__all__ = ["__version__", "load_model", "open_run", "save_model"]

if TYPE_CHECKING:
    from xelm.models.checkpoint import load_model, save_model
    from xelm.runs.run import open_run


def __getattr__(name: str) -> Any:
    if name in ("load_model", "save_model"):
        from xelm.models import checkpoint

        return getattr(checkpoint, name)
    if name == "open_run":
        from xelm.runs.run import open_run

        return open_run
    raise AttributeError(f"module 'xelm' has no attribute {name!r}")
