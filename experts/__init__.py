"""The experts of a RUN on disk: which there are, where each came from, and whether files changed.

    from experts.registry import Registry

    registry = Registry.load("RUN")
    for expert in registry.published():
        print(expert.reference, expert.languages, expert.parent, expert.tokens)

The record:
    registry    Registry: load, published, expert, for_language, rollback, ...
    expert      Expert, one version of one expert
    history     Event, what changed the experts and when

Changes of a registry, which return a new one:
    branch      one expert for each cluster
    grow        an expert for a new language, from a parent

Files:
    lock        locks of a RUN; update changes its registry
    manifest    hashes of the other files of a RUN
    verify      compare all files with their hashes
    merge       merge checkpoints into one
    merge_methods
                the methods of merging, each with its paper
    card        the model card of an expert

Models are not run here: neither JAX nor transformers is imported.
"""

from importlib import import_module
from typing import Any

# The names are submodules, loaded when first used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "branch",
    "card",
    "expert",
    "grow",
    "history",
    "lock",
    "manifest",
    "merge",
    "merge_methods",
    "registry",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"experts.{name}")
    raise AttributeError(f"module 'experts' has no attribute {name!r}")
