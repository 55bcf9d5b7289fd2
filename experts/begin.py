"""Beginning: versions that a command has prepared come into the registry, in training."""

from clustering.errors import UserError
from experts.expert import SEED, Expert, parse_reference
from experts.grow import refuse_served
from experts.registry import Registry


def begin(registry: Registry, *experts: Expert) -> Registry:
    """The registry with these versions in training, all at once; those that it has stay as they
    are.

    They may have been prepared some time ago, by an older registry. UserError if another expert
    serves a language by now that one of them was to be the first to serve, and if a parent was
    removed."""
    known = {expert.reference for expert in registry.experts}
    new = [expert for expert in experts if expert.reference not in known]
    for expert in new:
        before = [e for e in registry.published() if e.name == expert.name]
        served = {tag for each in before for tag in each.languages}
        for tag in expert.languages:
            if tag not in served:
                refuse_served(registry, tag)
        if expert.parent != SEED:
            parent = registry.expert(*parse_reference(expert.parent))
            if parent.removed is not None:
                raise UserError(parent.why_unused)
    return registry.add(*new)
