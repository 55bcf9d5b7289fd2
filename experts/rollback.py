"""Rolling back: an earlier version of an expert is published again."""

from clustering.errors import UserError
from experts.registry import Registry


def rollback(registry: Registry, name: str, version: int | None = None) -> Registry:
    """With `version` of an expert published again and the one published now retired.

    None takes the version that was in use before the present one was published, which is not always
    the next lower one: that may have been rolled back for good reasons. Nothing is deleted, so the
    newer version can come back the same way. UserError where there is no such version.
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
