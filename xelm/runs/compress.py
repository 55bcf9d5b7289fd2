"""`xelm compress`: the next version of an expert, of which less is stored: the difference to its
parent with a low rank, or without some layers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from experts.begin import begin
from experts.expert import Expert
from experts.lock import locked, update
from experts.registry import Registry
from xelm.models.checkpoint import read_config, stored_dtype
from xelm.models.difference import Difference, compressed, difference, reverted, write_difference
from xelm.runs import train
from xelm.runs.jobs import already_begun
from xelm.runs.options import CompressOptions
from xelm.runs.publish import CENTRE, publish
from xelm.runs.run import Run
from xelm.runs.shares import parent_directory


def compress(run: Run, name: str, options: CompressOptions) -> Expert:
    """Makes the next version of a published expert from the version in use, and publishes it if it
    passes the gate; no other expert changes.

    Its weights are those of the version in use, with what `options` says: each matrix differs from
    the parent's by a product of a low rank, and some layers are those of the parent. UserError for
    a version that differs from its parent in nothing. A version that does not pass the gate stays
    in training, as in `publish`.
    """
    with locked(run.directory, f"train-{name}"):
        registry = run.registry()
        before, begun = registry.in_use(name), registry.unfinished(name)
        if begun is not None and begun.made != _made(before, options):
            raise already_begun(run, begun, ", as something else; finish it")
        expert = begun or _next_version(run, registry, before, options)
        own, parent = before.directory(run.directory), parent_directory(run, before)
        if read_config(own) != read_config(parent):
            raise UserError(
                f"{before.reference} has pieces that {before.parent}, its parent, has not; train a "
                f"next version, and compress that: xelm train {run.directory} {name} --again"
            )
        train.check_parents(run, [own, parent])
        target = expert.directory(run.directory)
        if not target.exists():
            found = _difference(own, parent, options)
            update(run.directory, lambda r: begin(r, expert), "compress")
            extra = [own / CENTRE] if (own / CENTRE).exists() else []
            write_difference(target, found, stored_dtype(run.seed), extra=extra)
        return publish(run, expert)


def layers_of(text: str, count: int) -> tuple[int, ...]:
    """Numbers of layers, from 0, such as 4-7 or 2,4-5; UserError for layers that a model of `count`
    layers does not have."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UserError(f"layers such as 4-7 or 2,4-5 are wanted; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise UserError(
                f"the models of this RUN have the layers 0-{count - 1}; got {part.strip()!r}"
            )
        found += range(first, last + 1)
    return tuple(sorted(set(found)))


def _made(before: Expert, options: CompressOptions) -> dict[str, Any]:
    chosen = {"rank": options.rank, "energy": options.energy, "reverted layers": options.revert}
    given = {key: value for key, value in chosen.items() if value is not None}
    return {"by": "compress", "from": before.reference, **given}


def _next_version(run: Run, registry: Registry, before: Expert, options: CompressOptions) -> Expert:
    if options.revert is not None:
        layers_of(options.revert, read_config(run.seed).layer_count)
    facts: dict[str, Any] = {"parent": before.parent, "made": _made(before, options)}
    facts |= {"data": before.data, "tokens": before.tokens}
    return registry.start(before.name, **facts).experts[-1]


def _difference(own: Path, parent: Path, options: CompressOptions) -> Difference:
    layers: Sequence[int] = ()
    if options.revert is not None:
        layers = layers_of(options.revert, read_config(own).layer_count)
        found = reverted(own, parent, layers)
    else:
        found = difference(own, parent)
    if found is None or not found.tensors:
        raise UserError(f"{own} differs from its parent in nothing that would be left")
    if options.rank is None and options.energy is None:
        return found
    smaller = compressed(found, own, rank=options.rank, energy=options.energy)
    if not smaller.products and options.revert is None:
        asked = f"rank {options.rank}" if options.energy is None else f"energy {options.energy}"
        raise UserError(
            f"with {asked} no matrix of {own} takes less than now; give less, or layers to --revert"
        )
    return smaller
