"""Settings of any configuration, a frozen dataclass of values and of further ones: shown, read,
changed by name, and compared."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from clustering.errors import UserError

Config = TypeVar("Config")


def explained(config: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML: every value of a configuration, below a comment that explains it."""
    import yaml  # by which 1e-06 is text, and 1.0e-06 a number

    notes = field_notes(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from (f"{indent}# {line}" for line in textwrap.wrap(notes[field.name], 92))
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from explained(value, f"{indent}  ")
        else:
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
            yield f"{indent}{field.name}: {text.strip()}"


@functools.cache
def field_notes(kind: type) -> Mapping[str, str]:
    """Explanation of each field: the string below it in the source, which Python does not keep."""
    found = {}
    for one in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for field, note in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                assert isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
                found[field.target.id] = " ".join(str(note.value.value).split())
    return found


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, as they come back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[Config], value: Mapping[str, Any], path: str = "") -> Config:
    """Makes a configuration of type `kind` from JSON values. Raises UserError for unknown, missing
    and wrong fields; path: where the values stand in a larger configuration."""
    hints, arguments = typing.get_type_hints(kind), {}
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise UserError(f"{path or kind.__name__} has no field {', '.join(unknown[:5])}")
    for name, item in value.items():
        nested = _dataclass_of(hints[name])
        if nested and item is not None:
            item = from_json(nested, item, f"{path}.{name}" if path else name)
        arguments[name] = tuple(item) if isinstance(item, list) else item
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path or kind.__name__}: {error}") from error


def vary(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the configuration with other values at some paths, such as {"experts.tokens": 7}. As
    `dataclasses.replace`, but of nested fields; it is checked once all are made."""
    parts: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        parts.setdefault(name, {})[rest] = value
    values = {}
    for name, inner in parts.items():
        value = inner.pop("", getattr(config, name))
        try:
            values[name] = vary(value, inner) if inner else value
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return replace(config, **values)  # type: ignore[type-var]


def override(config: Config, settings: Iterable[str]) -> Config:
    """Returns the configuration with settings such as "experts.tokens=3e6" or
    "seed.runtime.dtype=bfloat16". Their order does not matter: the result is checked once all are
    made. Raises UserError for an unknown name, with the nearest that exists."""
    known, changes = dict(_paths(config)), {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"a setting is NAME=VALUE, such as experts.tokens=3e6; got {setting!r}")
        if path not in known:
            raise UserError(f"{setting!r}: there is no setting {path!r}; {_nearest(path, known)}")
        changes[path] = _parsed(known[path], text, setting)
    try:
        return vary(config, changes)
    except ValueError as error:
        raise UserError(str(error)) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names each value of `new` that is not as in `old`, as in "seed.tokens was 3, now 7"."""
    for name, value in new.items():
        before, path = old.get(name), f"{prefix}{name}"
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from differences(before, value, f"{path}.")
        elif before != value:
            yield f"{path} was {before!s:.80}, now {value!s:.80}"


def own_settings(config: Any, settings: Iterable[str], part: str) -> dict[str, Any]:
    """Name and value of those settings that make a training another one than its RUN plans: all but
    those of its runtime and of the gate."""
    found = {}
    for name in (setting.partition("=")[0] for setting in settings):
        if not name.startswith((f"{part}.runtime.", "gate.")):
            found[name] = functools.reduce(getattr, name.split("."), config)
    return found


def _paths(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of each setting that can be changed, such as "experts.optimizer.beta1"."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _nearest(path: str, known: Iterable[str]) -> str:
    """Names the setting that an unknown one most likely means: last parts count as much as all."""

    def likeness(other: str) -> float:
        pairs = ((path, other), (path.rpartition(".")[2], other.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"the nearest is {max(known, key=likeness)}"


def _parsed(hint: Any, text: str, setting: str) -> Any:
    """The value of a setting, of the type that its field has."""
    if isinstance(hint, types.UnionType):
        hint, *_ = (option for option in typing.get_args(hint) if option is not types.NoneType)
        if text == "null":
            return None
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if text not in known:
            raise UserError(f"{setting!r}: wanted {' or '.join(known)}")
        return text
    if hint is str:
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise UserError(f"{setting!r}: wanted true or false")
        return text == "true"
    try:
        number = float(text)
        if hint is int and number != int(number):
            raise ValueError
        return hint(number)
    except (ValueError, OverflowError, TypeError):
        wanted = "a whole number" if hint is int else "a number"
        raise UserError(f"{setting!r}: wanted {wanted}") from None


def _dataclass_of(hint: Any) -> Any:
    """The dataclass in a type, which may also allow None; None where there is no dataclass."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)
