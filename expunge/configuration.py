"""Strict nested configurations: dataclasses from a YAML file and the command line.

A section whose class is chosen by name is annotated with its table::

    objective: Annotated[Objective, OBJECTIVES] = field(default_factory=Esd)

and written ``objective: {type: esd, negative_guidance: 1.0}``, or ``objective: esd`` where the
defaults will do. The command line wins over the
file, the file over the defaults. What is not understood is a `UserError`, never dropped.
"""

import dataclasses
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from expunge.errors import UserError, unknown_name
from expunge.schema import (
    TYPE,
    Context,
    Text,
    decode_section,
    describe,
    encode,
    field_default,
    fields_of,
    read_yaml,
    registry_of,
    section_of,
)

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], prog: str = "expunge") -> T:
    """Build ``cls`` from ``--config FILE`` and ``--dotted.key value`` options.

    A field with ``metadata={"repeat": True}`` takes ``--key a b --key c`` as a list; ``--key``
    alone sets a true-or-false field; ``--help`` prints what the configuration holds and exits.

    Args:
        cls: The dataclass of the whole configuration.
        argv: The arguments after the command's name.
        prog: The command's name, for the help text.

    Raises:
        UserError: An unknown key, a wrong value, a missing file: one line each.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, prog))
        raise SystemExit(0)
    options = _read_options(cls, argv)
    config = options.pop(("config",), None)
    source, values = _read_file(config) if config is not None else (None, {})
    overrides: dict[str, Any] = {}
    for path, text in options.items():
        _put(cls, overrides, path, text)
    merged = _merge(cls, values, overrides, (), source or "")
    return decode_section(cls, merged, (), Context(cls, source, frozenset(options)))  # type: ignore[no-any-return]


def load(cls: type[T], path: str | Path) -> T:
    """Build ``cls`` from a YAML file alone."""
    return parse(cls, ["--config", str(path)])


def dump(config: Any) -> str:
    """The YAML text of a configuration, every default written out; `parse` reads it back."""
    return yaml.safe_dump(encode(config), sort_keys=False, allow_unicode=True)


def shipped() -> dict[str, str]:
    """The shipped configurations: ``train/name.yaml`` -> its first comment line."""
    root = resources.files("expunge.configs")
    found: dict[str, str] = {}
    pending = [("", root)]
    while pending:
        prefix, folder = pending.pop()
        for item in folder.iterdir():
            if item.is_dir() and item.name != "accelerate":  # those are for its launcher
                pending.append((f"{prefix}{item.name}/", item))
            elif item.name.endswith(".yaml"):
                lines = item.read_text(encoding="utf-8").splitlines()
                found[prefix + item.name] = lines[0].lstrip("# ") if lines else ""
    return dict(sorted(found.items()))


def help_text(cls: type, prog: str = "expunge") -> str:
    """Every option of a configuration with what it accepts, its default and its meaning."""
    lines = [
        f"usage: {prog} [--config FILE] [--dotted.key value …]",
        "",
        "  --config FILE",
        "      a YAML file, or the name of a shipped one (expunge ls configs)",
    ]
    lines += _help_lines(cls, "", None)
    return "\n".join(lines)


def _help_lines(cls: type, prefix: str, default: Any) -> list[str]:
    lines = []
    for name, (hint, field) in fields_of(cls).items():
        value = getattr(default, name) if default is not None else dataclasses.MISSING
        registry = registry_of(hint)
        meaning = field.metadata.get("help", "")
        section = section_of(hint)
        if registry is not None:
            lines.append(f"  --{prefix}{name} NAME, --{prefix}{name}.KEY VALUE")
            lines += [f"      {meaning}"] if meaning else []
            lines += [f"      {row}: {entry.summary}" for row, entry in registry.items()]
            continue
        if value is dataclasses.MISSING:
            value = field_default(field)
        if section is not None:
            instance = value if dataclasses.is_dataclass(value) else None
            lines += _help_lines(section, f"{prefix}{name}.", instance)
            continue
        required = value is dataclasses.MISSING
        end = "required" if required else f"default: {_inline(encode(value, hint))}"
        lines.append(f"  --{prefix}{name}  {describe(hint)}; {end}")
        lines += [f"      {meaning}"] if meaning else []
    return lines


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _field_at(cls: type, path: Sequence[str]) -> "tuple[Any, dataclasses.Field[Any]] | None":
    hint, field = fields_of(cls).get(path[0], (None, None))
    if field is None or len(path) == 1:
        return None if field is None else (hint, field)
    section = section_of(hint)
    return None if section is None else _field_at(section, path[1:])


def _read_options(cls: type, argv: Sequence[str]) -> dict[tuple[str, ...], Any]:
    options: dict[tuple[str, ...], Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UserError(
                f"got {word!r} on the command line; allowed: --key value; "
                "put a value that holds spaces in quotes"
            )
        path = tuple(name.split("."))
        hint, field = _field_at(cls, path) or (None, None)
        repeats = field is not None and field.metadata.get("repeat", False)
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (repeats or not values):
            values.append(rest.pop(0))
        if not values and hint is bool:
            values = ["true"]
        if not values:
            raise UserError(f"got --{name} without a value; allowed: --{name} value; add the value")
        if repeats:
            options.setdefault(path, []).extend(map(Text, values))
        elif path in options:
            raise UserError(f"got --{name} twice; allowed: once; remove one of them")
        else:
            options[path] = Text(values[0])
    return options


def _read_file(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"got --config {name}; allowed: a readable YAML file; {error}"
            ) from None
    else:
        text = _read_shipped(name)
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"got broken YAML{line} of {name}; allowed: YAML; {problem}") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"got {type(values).__name__} in {name}; allowed: key: value lines")
    return name, values


def _read_shipped(name: str) -> str:
    names = shipped()
    if name in names:
        return resources.files("expunge.configs").joinpath(*name.split("/")).read_text("utf-8")
    if Path(name).exists():
        raise UserError(f"got the folder {name} for --config; allowed: a YAML file in it")
    raise unknown_name("configuration file", name, names, "or give the path of a YAML file")


def _put(cls: type, tree: dict[str, Any], path: tuple[str, ...], text: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        outer = path[: depth + 1]
        inner = _as_section(tree.setdefault(part, {}), _may_be_choice(cls, outer))
        if not isinstance(inner, dict):
            dotted = ".".join(outer)
            raise UserError(
                f"got both --{dotted} {inner} and --{'.'.join(path)}; allowed: one of them; "
                f"remove one, or write --{dotted} as a section {{key: value}}"
            )
        tree[part] = inner
        tree = inner
    dotted, already = ".".join(path), tree.get(path[-1])
    if already is None:
        tree[path[-1]] = text
        return
    if not isinstance(already, dict):
        raise UserError(
            f"got --{dotted} twice, {already} and {text}; allowed: once; remove one of them"
        )
    section = _as_section(text, _may_be_choice(cls, path))
    if not isinstance(section, dict):
        raise UserError(
            f"got both --{dotted} {text} and keys below it; allowed: one of them; remove one"
        )
    if twice := [key for key in section if key in already]:
        raise UserError(
            f"got --{dotted}.{twice[0]} twice, {section[twice[0]]} and {already[twice[0]]}; "
            "allowed: once; remove one of them"
        )
    tree[path[-1]] = section | already


def _may_be_choice(cls: type, path: tuple[str, ...]) -> bool:
    """Whether a bare name may stand at ``path``; what a choice holds is known only once made."""
    for end in range(1, len(path) + 1):
        found = _field_at(cls, path[:end])
        if found is None:
            return False
        if registry_of(found[0]) is not None:
            return True
    return False


def _as_section(value: Any, choice: bool = False) -> Any:
    """Command-line text as the section that it spells; of a choice, a bare name is one too."""
    parsed = value
    if isinstance(value, Text):
        try:
            parsed = read_yaml(value)
        except yaml.YAMLError:
            return value
    if choice and isinstance(parsed, str):
        return {TYPE: value}
    return parsed if isinstance(parsed, dict) else value


def _merge(
    cls: type, file: dict[Any, Any], over: dict[str, Any], path: tuple[str, ...], source: str
) -> dict[Any, Any]:
    """Lay the command line over the file; another `type` replaces its whole section."""
    if TYPE in file and TYPE in over and file[TYPE] != over[TYPE]:
        unused = [str(key) for key in file if key != TYPE and key not in over]
        if unused:
            print(
                f"expunge: note: --{'.'.join((*path, TYPE))} {over[TYPE]} replaces the section of "
                f"{source}: its {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used",
                file=sys.stderr,
            )
        return dict(over)
    merged = dict(file)
    for key, value in over.items():
        below, inner, choice = file.get(key), value, _may_be_choice(cls, (*path, key))
        if choice and isinstance(below, str) and isinstance(_as_section(value), dict):
            below = {TYPE: below}
        if isinstance(below, dict):
            inner = _as_section(value, choice)
        if isinstance(below, dict) and isinstance(inner, dict):
            merged[key] = _merge(cls, below, inner, (*path, key), source)
        else:
            merged[key] = value
    return merged
