"""The `Registry`: the experts of a RUN, and how they may change.

A change returns a new Registry and leaves all other records as they were; only `load` and `save`
touch the disk. Checkpoints are not read here (`verify` reads them), and the RUN is not locked
(`lock.update` locks it).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from clustering.errors import UserError
from clustering.files import read_json, write_json
from clustering.languages import find, lookup
from experts.consistency import contradictions, round_of
from experts.expert import SEED, Expert, check_types, hash_faults, parse_reference, stays_inside
from experts.history import Event, about, name_now

FORMAT = 1
FILE_NAME = "registry.json"
_KEYS = ("format", "seed", "experts", "history")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Registry:
    """The seed and all versions of all experts of a RUN; UserError if they contradict each
    other."""

    seed_path: str = SEED
    """Directory of the seed checkpoint, relative to the RUN."""
    seed_sha256: dict[str, str]
    """File, relative to `seed_path` -> hexadecimal SHA-256."""
    experts: tuple[Expert, ...] = ()
    """Versions of experts, in the order in which they were added."""
    history: tuple[Event, ...] = ()
    """What changed the experts, oldest first; `lock.update` adds to it."""
    seed_more: dict[str, Any] = field(default_factory=dict)
    """Further keys under "seed" in registry.json, kept as they are."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of registry.json, kept as they are."""

    def __post_init__(self):
        faults = [*hash_faults(self.seed_sha256), *contradictions(self.experts)]
        if not stays_inside(self.seed_path):
            faults.insert(0, f"the seed must lie inside the RUN; got {self.seed_path!r}")
        if faults:
            raise UserError(f"registry: {'; '.join(faults[:5])}")

    def __repr__(self) -> str:
        statuses = Counter(expert.status for expert in self.experts)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        return f"<Registry of {len(self.experts)} expert versions{': ' if counts else ''}{counts}>"

    @classmethod
    def load(cls, run: Path | str) -> Self:
        """The registry of a RUN; UserError if it is missing, damaged, or of a newer format."""
        path = Path(run) / FILE_NAME
        value = read_json(path, newest_format=FORMAT)
        try:
            return cls._from_json(value)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def _from_json(cls, value: Any) -> Self:
        check_types("registry", value, {"seed": dict, "experts": list})
        seed, history = value["seed"], value.get("history", [])
        check_types("registry", {"history": history}, {"history": list})
        check_types("seed", seed, {"path": str, "sha256": dict})
        check_types("seed", seed["sha256"], dict.fromkeys(seed["sha256"], str))
        return cls(
            seed_path=seed["path"],
            seed_sha256=seed["sha256"],
            experts=tuple(
                Expert.from_json(record, f"experts[{i}]")
                for i, record in enumerate(value["experts"])
            ),
            history=tuple(
                Event.from_json(event, f"history[{i}]") for i, event in enumerate(history)
            ),
            seed_more={key: seed[key] for key in seed if key not in ("path", "sha256")},
            more={key: value[key] for key in value if key not in _KEYS},
        )

    def save(self, run: Path | str) -> None:
        """Replaces registry.json atomically: a crash leaves the complete old or new file."""
        write_json(Path(run) / FILE_NAME, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of registry.json."""
        return {
            "format": FORMAT,
            "seed": {"path": self.seed_path, "sha256": self.seed_sha256} | self.seed_more,
            "experts": [expert.to_json() for expert in self.experts],
            "history": [event.to_json() for event in self.history],
        } | self.more

    def published(self) -> tuple[Expert, ...]:
        """The newest published version of each name, in order of round and name."""
        by_version = sorted(self.experts, key=lambda e: e.version)
        newest = {expert.name: expert for expert in by_version if expert.status == "published"}
        return _in_order(newest.values())

    def retired(self) -> tuple[str, ...]:
        """Names of the experts that were published, and of which no version is in use."""
        weighed = (e for e in self.experts if e.sha256 and e.removed is None and not e.intermediate)
        names = dict.fromkeys(expert.name for expert in weighed)
        return tuple(n for n in names if all(e.status == "retired" for e in self.versions(n)))

    def training(self) -> tuple[Expert, ...]:
        """The versions whose training is not finished, in order of round and name."""
        return _in_order(expert for expert in self.experts if expert.status == "training")

    def unfinished(self, name: str) -> Expert | None:
        """The version of an expert whose training is not finished; None if there is none."""
        return next((expert for expert in self.training() if expert.name == name), None)

    def versions(self, name: str) -> tuple[Expert, ...]:
        """All versions of one name, oldest first; UserError if there is none."""
        found = sorted((e for e in self.experts if e.name == name), key=lambda e: e.version)
        if not found:
            known = ", ".join(sorted({expert.name for expert in self.experts})) or "none"
            now = name_now(self.history, name)
            renamed = f"it was renamed to {now!r}; " if now != name else ""
            raise UserError(f"there is no expert {name!r}; {renamed}known: {known}")
        return tuple(found)

    def expert(self, name: str, version: int | None = None) -> Expert:
        """That version, else the newest published, else the newest; UserError if there is none."""
        versions = self.versions(name)
        if version is None:
            return max(versions, key=lambda e: (e.status == "published", e.version))
        for expert in versions:
            if expert.version == version:
                return expert
        raise UserError(f"expert {name!r} has no version {version}; it has {_listed(versions)}")

    def in_use(self, name: str) -> Expert:
        """The published version of an expert; UserError if it is retired or in training."""
        expert = self.expert(name)
        if expert.status != "published":
            raise UserError((self.last_in_use(name) or expert).why_unused)
        return expert

    def for_language(self, language: str) -> Expert:
        """The published expert that serves a language, of several that of the latest round.

        Takes any code of the language. If no expert serves it, `languages.lookup` finds a wider
        one, such as `en` for `en-GB`; UserError if there is none."""
        served = sorted({tag for expert in self.published() for tag in expert.languages})
        tag = lookup(language, served)
        if tag is None:
            known = f"served: {', '.join(served) or 'none'}"
            retired = self.retired_for(language)
            more = f"{retired.why_unused}; " if retired else ""
            raise UserError(f"no published expert serves {language!r}; {more}{known}")
        serving = [expert for expert in self.published() if tag in expert.languages]
        return max(serving, key=lambda e: e.round)

    def holder_of(self, language: str, besides: str | None = None) -> Expert | None:
        """The expert that serves exactly this language, or is trained for it; None if there is
        none. besides: name of an expert that does not count."""
        held = (e for e in self.experts if e.status != "retired" and e.name != besides)
        return next((expert for expert in held if find(language, expert.languages)), None)

    def retired_for(self, language: str) -> Expert | None:
        """The newest version of a retired expert for a language; None if there is none."""
        experts = [self.last_in_use(name) or self.expert(name) for name in self.retired()]
        found = (expert for expert in experts if lookup(language, expert.languages))
        return next(found, None)

    def round_after(self, parent: str, name: str) -> int:
        """The round of an expert `name` that starts from `parent`, which is 'seed' or 'NAME@vN'."""
        return round_of(None if parent == SEED else self.expert(*parse_reference(parent)), name)

    def add(self, *experts: Expert) -> Self:
        """The registry with these records after the others."""
        return replace(self, experts=self.experts + experts)

    def next_version(self, name: str) -> int:
        """Number of the next version of an expert of this name: one more than any that has, or that
        was published under, the name, since those directories are in use."""
        firsts = [parse_reference(expert.first_reference) for expert in self.experts]
        numbers = [version for other, version in firsts if other == name]
        return 1 + max(numbers + [e.version for e in self.experts if e.name == name], default=0)

    def start(self, name: str, *, parent: str | None = None, **facts: Any) -> Self:
        """The registry with the next version of an expert in training, which is as the version in
        use, or else the newest: for the same languages, on the same text, with the same settings.

        `parent` is 'NAME@vN' or 'seed'; None takes the parent of that version. facts: further
        fields of its record that differ, such as its settings."""
        if begun := self.unfinished(name):
            raise UserError(f"{begun.reference} is in training already; finish or discard it first")
        before = self.expert(name)
        origin = before.parent if parent is None else parent
        following = Expert(
            name=name,
            version=self.next_version(name),
            parent=origin,
            round=self.round_after(origin, name),
            languages=before.languages,
            cluster=before.cluster,
            documents=before.documents,
            reason=before.reason if origin == before.parent else None,
            settings=before.settings,
            corpora=before.corpora,
            donor=(before.donor or before.parent) if before.cluster is None else None,
            vocabulary=before.vocabulary,
        )
        return self.add(replace(following, **facts))

    def publish(
        self, name: str, version: int, *, sha256: Mapping[str, str], tokens: int, **facts: Any
    ) -> Self:
        """The registry with a version published, and the one of that name published before retired.

        facts: further fields of its record, such as its evaluation.
        Publishing the same hashes again changes nothing. UserError for any other version that is
        not in training, since a published version never changes."""
        expert = self.expert(name, version)
        facts |= {"sha256": dict(sha256), "tokens": tokens}
        # An intermediate expert is a parent alone, and never in use.
        status = "retired" if expert.intermediate else "published"
        finished = replace(expert, **facts, status=status)
        if expert == finished:
            return self
        if expert.status != "training":
            raise UserError(
                f"{expert.reference} is {expert.status} and never changes; start a new version"
            )
        present = self.expert(name)
        replaces = present.version if present.status == "published" else None
        if expert.intermediate:
            return self._with(finished)
        return self._retire_published(name)._with(replace(finished, replaces=replaces))

    def rollback(self, name: str, version: int | None = None) -> Self:
        """The registry with a retired version published again, and the present one retired.

        version: None takes the one that the present version replaced, which is not always the next
        lower one: that may have been rolled back itself. Directly after a rollback it changes
        nothing, so that a command that was interrupted can be run again; to go further back, name
        the version. Nothing is deleted, so the newer version can come back in the same way. A
        version that is published already changes nothing. UserError if there is no such version,
        and for one that would serve a language that another expert holds by now."""
        if version is None:
            present = self.expert(name)
            actions = [event.action for event in about(self.history, name)]
            lasting = [action for action in actions if action not in ("push", "rename")]
            if present.status == "published" and lasting[-1:] == ["rollback"]:
                return self
            version = present.replaces if present.status == "published" else None
        if version is None:
            known = _listed(self.versions(name))
            raise UserError(f"expert {name!r} has no version to go back to; it has {known}")
        expert = self.expert(name, version)
        if expert.status == "published":
            return self
        if expert.intermediate or expert.removed is not None:
            raise UserError(expert.why_unused)
        if expert.status != "retired" or not expert.sha256:
            raise UserError(
                f"{expert.reference} is {expert.status}; "
                "only a version published before can come back"
            )
        self._refuse_held(expert)
        return self._retire_published(name)._with(replace(expert, status="published"))

    def _refuse_held(self, expert: Expert) -> None:
        """Raises UserError for a version that would serve, beside the languages that its expert
        serves now, one that another expert holds."""
        now = {tag for e in self.published() if e.name == expert.name for tag in e.languages}
        for tag in expert.languages:
            other = None if tag in now else self.holder_of(tag, besides=expert.name)
            if other is not None:
                way = f"take it out of use first with: xelm retire RUN {other.name}"
                older = [e for e in self.versions(other.name) if e.sha256 and e.removed is None]
                without = next((e for e in older if not find(tag, e.languages)), None)
                if other.status == "training":
                    way = f"give it up first with: xelm discard RUN {other.name}"
                elif without is not None:
                    back = f"xelm rollback RUN {other.name} --version {without.version}"
                    way = f"go back to a version of it without {tag!r} first with: {back}"
                raise UserError(
                    f"{expert.reference} cannot come back: {tag!r} is held by {other.reference} "
                    f"({other.status}) by now; {way}"
                )

    def retire_expert(self, name: str) -> Self:
        """The registry without a published version of an expert, which is then neither served nor a
        parent of new experts; its records, hashes and files stay, and so do its children.

        A retired expert changes nothing. UserError for an expert that was never published, and for
        the last published one: there would be nothing to serve or to grow from."""
        if not any(expert.sha256 for expert in self.versions(name)):
            raise UserError(f"{name} was never published; give it up with: xelm discard RUN {name}")
        if [expert.name for expert in self.published()] == [name]:
            raise UserError(
                f"{name} is the last published expert; without it there is nothing to serve"
            )
        return self._retire_published(name)

    def restore(self, name: str, version: int | None = None) -> Self:
        """The registry with a retired expert published again.

        version: None takes the one that was in use when the expert was retired. An expert that is
        published in this version changes nothing. UserError if another version is published, and as
        `rollback` raises it."""
        present = self.expert(name)
        if present.removed is not None:
            raise UserError(present.why_unused)
        if present.status == "published":
            if version in (None, present.version):
                return self
            raise UserError(
                f"{present.reference} is published; go back to v{version} with: xelm rollback RUN "
                f"{name} --version {version}"
            )
        if version is None:
            last = self.last_in_use(name)
            if last is None:
                known = _listed(self.versions(name))
                raise UserError(
                    f"it is not known which version of {name} was in use last; name one with "
                    f"--version; it has {known}"
                )
            version = last.version
        return self.rollback(name, version)

    def last_in_use(self, name: str) -> Expert | None:
        """The version that was published when an expert was last retired; None if it is not
        known."""
        weighed = [e for e in self.versions(name) if e.sha256 and e.removed is None]
        if len(weighed) == 1:
            return weighed[0]
        events = [event for event in about(self.history, name) if event.action == "retire"]
        found = [parse_reference(reference)[1] for event in events for reference in event.experts]
        known = {expert.version: expert for expert in weighed}
        return known.get(found[-1]) if found else None

    def rename(self, names: Mapping[str, str]) -> Self:
        """The registry with experts renamed, in all versions and as parents. Their directories keep
        their names, so that the files and their hashes stay as they are.

        names: present -> new name. A pair that was renamed already changes nothing. UserError for
        an expert in training, whose files are found by its name, and for a name that is taken."""
        done = {old for old, new in names.items() if self._was_renamed(old, new)}
        names = {old: new for old, new in names.items() if old not in done}
        for old, new in names.items():
            for expert in self.versions(old):
                if expert.status == "training":
                    raise UserError(
                        f"{expert.reference} is in training; finish it or give it up, and rename "
                        f"{old} then"
                    )
            if any(expert.name.lower() == new.lower() != old.lower() for expert in self.experts):
                raise UserError(f"{new!r} names another expert already; give another name")
        if len(set(names.values())) < len(names):
            raise UserError(f"two experts cannot have one name; got {', '.join(names.values())}")
        return replace(self, experts=tuple(expert.renamed(names) for expert in self.experts))

    def _was_renamed(self, old: str, new: str) -> bool:
        present = {expert.name for expert in self.experts}
        return old not in present and new in present and name_now(self.history, old) == new

    def discard(self, name: str) -> Self:
        """The registry without the version of that name in training; UserError if there is none.

        No other record can refer to it, since only published versions have children."""
        unfinished = [e for e in self.versions(name) if e.status == "training"]
        if not unfinished:
            known = _listed(self.versions(name))
            raise UserError(f"expert {name!r} is not in training; it has {known}")
        return replace(self, experts=tuple(e for e in self.experts if e not in unfinished))

    def remove(self, name: str, when: str) -> Self:
        """The registry without an expert, in all its versions. Of versions from which other experts
        descend, or whose languages are a part of their rows, a stub stays until they are removed
        too. when: time in UTC.

        UserError if there is no such expert, or if a version of it is published."""
        if any(expert.status == "published" for expert in self.versions(name)):
            raise UserError(f"{name} is published; retire it first: xelm retire RUN {name}")
        kept = set(self.needed(name))
        experts = (
            expert.stub(when) if expert.name == name and expert.removed is None else expert
            for expert in self.experts
            if expert.name != name or expert.reference in kept
        )
        left = replace(self, experts=tuple(experts))
        for stub in {expert.name for expert in left.experts if expert.removed is not None} - {name}:
            if not left.needed(stub):  # the last that descended from it is gone now
                return left.remove(stub, when)
        return left

    def needed(self, name: str) -> dict[str, list[str]]:
        """Versions of an expert from which other experts descend, or whose languages are a part of
        their rows -> references of these experts."""
        known = {expert.reference: expert for expert in self.experts}
        found: dict[str, list[str]] = {}
        for expert in self.experts:
            if expert.name == name:
                continue
            for origin in (expert.parent, expert.donor):
                while origin in known and origin != SEED:
                    if known[origin].name == name:
                        others = found.setdefault(origin, [])
                        others += [expert.reference] * (expert.reference not in others)
                    origin = known[origin].parent
        return found

    def retire(self, name: str, version: int) -> Self:
        """The registry with a version retired. Its record, its hashes and its files stay."""
        return self._with(replace(self.expert(name, version), status="retired"))

    def _retire_published(self, name: str) -> Self:
        registry = self
        for expert in self.versions(name):
            if expert.status == "published":
                registry = registry.retire(name, expert.version)
        return registry

    def _with(self, expert: Expert) -> Self:
        """The registry with the record of that name and version replaced."""
        experts = (expert if old.reference == expert.reference else old for old in self.experts)
        return replace(self, experts=tuple(experts))


def _listed(versions: Iterable[Expert]) -> str:
    return ", ".join(f"v{expert.version} ({expert.status})" for expert in versions)


def _in_order(experts: Iterable[Expert]) -> tuple[Expert, ...]:
    return tuple(sorted(experts, key=lambda e: (e.round, e.name)))
