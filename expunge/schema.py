"""Plain YAML values into typed dataclasses, and back, strictly."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from expunge.errors import UserError, nearest, unknown_name
from expunge.registry import Registry

TYPE = "type"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_PLAIN = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    Any: "any value",
}


class Text(str):
    """A value typed on the command line: what it means depends on the type of its field."""


class StrictLoader(yaml.SafeLoader):
    """YAML without Python objects, in which a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what plain YAML resolves silently: the last of two equal keys wins."""
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(
                    f"got a list or a mapping as a key in line {line}; allowed: text; write what "
                    "is before the colon without brackets"
                )
            if key_node.value in seen:
                raise UserError(
                    f"got key {key_node.value!r} twice, again in line {line}; "
                    "allowed: each key once; remove one of them"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """The value that ``text`` spells in YAML."""
    return yaml.load(text, StrictLoader)


@dataclass(frozen=True)
class Context:
    """Where values came from, for error messages."""

    root: type
    file: str | None = None
    overrides: frozenset[tuple[str, ...]] = frozenset()

    def where(self, path: tuple[str, ...]) -> str:
        """Say where the value at ``path`` was written."""
        if self.file is None or any(path[: len(o)] == o for o in self.overrides):
            return "on the command line"
        return f"in {self.file}"

    def guess(self, key: str, siblings: Sequence[str]) -> str | None:
        """The key that was meant: a near sibling, or the same name in another section."""
        close = nearest(key, siblings)
        if close is not None:
            return close
        return next((d for d in dotted_keys(self.root) if d.split(".")[-1] == key), None)


def decode(hint: Any, value: Any, path: tuple[str, ...], context: Context, default: Any) -> Any:
    """Turn the YAML value at ``path`` into an instance of the type ``hint``.

    Args:
        hint: A type annotation: a plain type, Literal, list, tuple, dict, union, a dataclass or
            ``Annotated[Base, registry]``.
        value: What YAML or the command line gave.
        path: The key, one part per section.
        context: Where values came from.
        default: The default instance of a section, or MISSING; keys not given are taken from it.
    """
    if isinstance(value, Text):
        value = _meaning(hint, value, path, context)
    registry = registry_of(hint)
    origin = get_origin(hint)
    args = get_args(hint)
    if origin in (Union, UnionType):
        return _decode_union(hint, value, path, context, default)
    if registry is not None:
        return _decode_choice(registry, hint, value, path, context, default)
    if origin is Annotated:
        return decode(args[0], value, path, context, default)
    if dataclasses.is_dataclass(hint):
        return decode_section(hint, value, path, context, default)  # type: ignore[arg-type]
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            _wrong(hint, value, path, context)
        return value
    if origin in (list, tuple, set, frozenset):
        return _decode_items(hint, origin, args, value, path, context)
    if origin is dict:
        if not isinstance(value, Mapping):
            _wrong(hint, value, path, context)
        return {
            decode(args[0], key, (*path, str(key)), context, MISSING): decode(
                args[1], item, (*path, str(key)), context, MISSING
            )
            for key, item in value.items()
        }
    return _decode_plain(hint, value, path, context)


def decode_section(
    cls: type, value: Any, path: tuple[str, ...], context: Context, default: Any = MISSING
) -> Any:
    """Build the dataclass ``cls`` from a mapping; every key must be one of its fields."""
    if not isinstance(value, Mapping):
        _wrong(cls, value, path, context)
    hints = fields_of(cls)
    for key in value:
        if key not in hints:
            _unknown_key(key, list(hints), path, context)
    arguments = _carried(cls, default)
    for name, (hint, field) in hints.items():
        if name in value:
            own = arguments.get(name, field_default(field))
            arguments[name] = decode(hint, value[name], (*path, name), context, own)
        elif name not in arguments and field_default(field) is MISSING:
            dotted = ".".join((*path, name))
            raise UserError(
                f"got no {dotted}, which is required; allowed: {describe(hint)}; "
                f"set {dotted} in the configuration file or --{dotted} on the command line"
            )
    try:
        return cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        prefix = f"{'.'.join(path)}: " if path else ""
        raise UserError(f"{prefix}{error}") from error


def encode(value: Any, hint: Any = Any) -> Any:
    """Plain YAML values for a decoded configuration; `decode` reads them back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        registry = registry_of(hint)
        head = {TYPE: registry.name_of(type(value))} if registry is not None else {}
        fields = fields_of(type(value))
        return head | {k: encode(getattr(value, k), h) for k, (h, _) in fields.items()}
    if isinstance(value, Path):
        return str(value)
    args = get_args(hint)
    if isinstance(value, Mapping):
        return {
            key: encode(item, args[1] if len(args) == 2 else Any) for key, item in value.items()
        }
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        fixed = len(args) == len(value) and Ellipsis not in args
        item_hints = args if fixed else [args[0] if args else Any] * len(value)
        return [encode(item, h) for item, h in zip(value, item_hints, strict=True)]
    return value


def fields_of(cls: type) -> dict[str, tuple[Any, "dataclasses.Field[Any]"]]:
    """The resolved annotation and the field of every key of a section."""
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: (hints[f.name], f) for f in dataclasses.fields(cls) if f.init}
    if TYPE in fields:
        raise TypeError(f"{cls.__qualname__}: the field name {TYPE!r} is reserved for choices")
    return fields


def field_default(field: "dataclasses.Field[Any]") -> Any:
    """The default value of a field, or MISSING."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, sections flattened; what a choice offers is left out."""
    for name, (hint, _) in fields_of(cls).items():
        yield prefix + name
        section = section_of(hint)
        if section is not None and registry_of(hint) is None:
            yield from dotted_keys(section, f"{prefix}{name}.")


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def section_of(hint: Any) -> type | None:
    """The dataclass of an annotation, also inside a union."""
    for member in members(hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def registry_of(hint: Any) -> Registry | None:
    """The table of an annotation ``Annotated[Base, table]``, also inside a union."""
    for member in members(hint):
        for mark in getattr(member, "__metadata__", ()):
            if isinstance(mark, Registry):
                return mark
    return None


def describe(hint: Any) -> str:
    """What a field accepts, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(a) for a in args)
    registry = registry_of(hint)
    if registry is not None:
        return f"NAME or a section {{{TYPE}: NAME, …}} with NAME one of {', '.join(registry)}"
    if origin is Annotated:
        return describe(args[0])
    if dataclasses.is_dataclass(hint):
        return f"a section with the keys {', '.join(fields_of(hint))}"  # type: ignore[arg-type]
    if origin is Literal:
        return " or ".join(str(a) for a in args)
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)}: {', '.join(describe(a) for a in args)}"
    if origin in (list, tuple, set, frozenset):
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return f"a mapping to {describe(args[1])}"
    return _PLAIN.get(hint, str(hint))


def _decode_plain(hint: Any, value: Any, path: tuple[str, ...], context: Context) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if hint is float:
        # YAML 1.1 reads 1e-5, which has no dot, as text.
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if type(value) in (int, float) and not math.isnan(value):
            return float(value)
    elif hint in (bool, int, str, NoneType) and type(value) is hint:
        return value
    elif hint not in _PLAIN:
        raise TypeError(f"{'.'.join(path)}: {hint} is not a type that a configuration can hold")
    return _wrong(hint, value, path, context)


def _decode_items(
    hint: Any, origin: Any, args: Any, value: Any, path: tuple[str, ...], context: Context
) -> Any:
    if not isinstance(value, list):
        _wrong(hint, value, path, context)
    if origin is tuple and Ellipsis not in args:
        if len(value) != len(args):
            _wrong(hint, value, path, context)
        item_hints = list(args)
    else:
        item_hints = [args[0]] * len(value)
    return origin(
        decode(item_hint, item, (*path, str(i)), context, MISSING)
        for i, (item_hint, item) in enumerate(zip(item_hints, value, strict=True))
    )


def _decode_union(
    hint: Any, value: Any, path: tuple[str, ...], context: Context, default: Any
) -> Any:
    alternatives = members(hint)
    if value is None and NoneType in alternatives:
        return None
    alternatives = tuple(a for a in alternatives if a is not NoneType)
    sections = [a for a in alternatives if dataclasses.is_dataclass(a) or registry_of(a)]
    if isinstance(value, Mapping) and len(sections) == 1:
        return decode(sections[0], value, path, context, default)
    for alternative in alternatives:
        try:
            return decode(alternative, value, path, context, default)
        except UserError:
            structured = isinstance(value, (Mapping, list)) or registry_of(alternative) is not None
            if len(alternatives) == 1 and structured:
                raise
    return _wrong(hint, value, path, context)


def _decode_choice(
    registry: Registry, hint: Any, value: Any, path: tuple[str, ...], context: Context, default: Any
) -> Any:
    if isinstance(value, str):
        value = {TYPE: value}
    if not isinstance(value, Mapping):
        _wrong(hint, value, path, context)
    dotted = ".".join((*path, TYPE))
    if TYPE in value:
        name = value[TYPE]
    elif default is None or default is MISSING:
        raise UserError(
            f"got no {dotted} {context.where(path)}; allowed: {', '.join(registry)}; "
            f"choose one of them"
        )
    else:
        name = registry.name_of(type(default))
    if not isinstance(name, str) or name not in registry:
        do = f"change {dotted} {context.where((*path, TYPE))}"
        raise unknown_name(registry.table, name, registry, do)
    cls = registry.load(str(name))
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{registry[name].target} is listed as a {registry.table}: not a dataclass")
    rest = {key: item for key, item in value.items() if key != TYPE}
    own = default if type(default) is cls else MISSING
    return decode_section(cls, rest, path, context, own)  # type: ignore[arg-type]


def _meaning(hint: Any, text: Text, path: tuple[str, ...], context: Context) -> Any:
    """Read command-line text as YAML, unless the field takes text."""
    plain = str(text)
    kinds = members(hint)
    takes_text = any(kind in (str, Path) for kind in kinds)
    if any(get_origin(kind) is Literal and plain in get_args(kind) for kind in kinds):
        return plain
    try:
        value = read_yaml(plain)
    except yaml.YAMLError:
        if not takes_text:
            _wrong(hint, plain, path, context)
        return plain
    if not takes_text:
        return value
    if value is None and NoneType in kinds and plain:
        return None
    has_structure = any(get_origin(k) or dataclasses.is_dataclass(k) for k in kinds)
    return value if isinstance(value, (list, dict)) and has_structure else plain


def _carried(cls: type, default: Any) -> dict[str, Any]:
    if default is None or default is MISSING:
        return {}
    try:
        # Equal to a fresh one: leave values that the class derives from others to the class.
        if default == cls():
            return {}
    except TypeError:
        pass
    return {name: getattr(default, name) for name in fields_of(cls)}


def _unknown_key(key: Any, allowed: list[str], path: tuple[str, ...], context: Context) -> NoReturn:
    dotted = ".".join((*path, str(key)))
    guess = context.guess(str(key), allowed)
    here = f"in {'.'.join(path)}" if path else "at the top"
    hint = f"; did you mean {guess}?" if guess else f"; remove {dotted}"
    raise UserError(
        f"got unknown key {dotted} {context.where((*path, str(key)))}; "
        f"allowed {here}: {', '.join(allowed) or 'no key'}{hint}"
    )


def _wrong(hint: Any, value: Any, path: tuple[str, ...], context: Context) -> NoReturn:
    dotted = ".".join(path) or "the configuration"
    shown = "null" if value is None else repr(value)
    do = f"change {dotted}"
    kinds = members(hint)
    if isinstance(value, str) and any(get_origin(k) in (list, tuple) for k in kinds):
        do = f"write it as a list: [{value}]"
    elif str in kinds and isinstance(value, (bool, int, float)):
        do = f'put it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    raise UserError(
        f"got {shown} for {dotted} {context.where(path)}; allowed: {describe(hint)}; {do}"
    )
