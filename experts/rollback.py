"""Rolling back: publishing an earlier version of an expert again."""

from clustering.errors import UserError
from experts.registry import Registry


def rollback(registry: Registry, name: str, version: int | None = None) -> Registry:
    """The registry with `version` of an expert published again, and the present one retired.

    None takes the version that the present one replaced, which is not always the next lower one:
    that may have been rolled back itself. Nothing is deleted, so the newer version can come back in
    the same way. UserError if there is no such version.
    """
    if version is not None:
        return registry.republish(name, version)
    present = registry.expert(name)
    if present.status != "published" or present.replaces is None:
        known = ", ".join(
            f"v{expert.version} ({expert.status})" for expert in registry.versions(name)
        )
        raise UserError(f"expert {name!r} has no version to go back to; it has {known}")
    return registry.republish(name, present.replaces)
