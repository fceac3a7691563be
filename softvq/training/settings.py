"""How a dataclass of settings is declared, described, checked and read from a file."""

import dataclasses
import difflib
import os
import tomllib
import types
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


class ConfigError(ValueError):
    """A setting that is not allowed; its one line names it, its value and what is allowed."""


class PerModel(dict[str, Any]):
    """Defaults of a setting by model; a model that is not among them has no such setting."""


def each(models: Iterable[str], default: Any, **others: Any) -> PerModel:
    """One default for several models; `others` for some of them (with _ for -)."""
    exceptions = {name.replace("_", "-"): value for name, value in others.items()}
    return PerModel(dict.fromkeys(models, default) | exceptions)


def setting(default: Any, group: str, help: str) -> Any:
    """A field of settings, with what the command line says about it."""
    if isinstance(default, PerModel):
        metadata = {"group": group, "help": help, "defaults": default}
        return field(default=None, metadata=metadata)
    return field(default=default, metadata={"group": group, "help": help})


def fill_defaults(settings: Any) -> None:
    """Give a new dataclass of settings the defaults of its `model`.

    Raises ConfigError for a setting that the model does not have.
    """
    for item in dataclasses.fields(settings):
        defaults = item.metadata.get("defaults")
        if defaults is None:
            continue
        value = getattr(settings, item.name)
        if settings.model in defaults:
            if value is None:
                object.__setattr__(settings, item.name, defaults[settings.model])
        elif value is not None:
            raise ConfigError(
                f"{item.name}: {value} does not apply to model {settings.model}, only to "
                f"{', '.join(defaults)}"
            )


def describe_default(item: dataclasses.Field[Any], models: Sequence[str]) -> str:
    """ "; only for …; default: …" of a field, as far as there is something to say."""
    defaults: Mapping[str, Any] = item.metadata.get("defaults", dict.fromkeys(models, item.default))
    others = [model for model in models if model not in defaults]
    which = f"not for {', '.join(others)}" if others else ""
    if len(others) > len(defaults):
        which = f"only for {', '.join(defaults)}"
    values = Counter(value for value in defaults.values() if value is not None).most_common()
    default = ""
    if values:
        usual, *exceptions = (value for value, _ in values)
        default = f"default: {usual}"
        for value in exceptions:
            default += f", {value} for {', '.join(m for m in defaults if defaults[m] == value)}"
    return "".join(f"; {part}" for part in (which, default) if part)


def value_types(settings: type) -> dict[str, Any]:
    """The type of each setting without its None: a class or a Literal."""
    return {
        name: next(a for a in get_args(hint) if a is not type(None))
        if get_origin(hint) in (Union, types.UnionType)
        else hint
        for name, hint in get_type_hints(settings).items()
    }


def read_toml(path: Path, settings: type) -> dict[str, Any]:
    """Settings of a TOML file, checked against the known names.

    Raises ConfigError for a missing or malformed file and for an unknown key.
    """
    kinds = value_types(settings)
    try:
        with path.open("rb") as file:  # TOML is UTF-8, whatever the locale
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"{path}: unknown setting {name!r}{nearest_hint(name, kinds)}")
        if kinds[name] is Path and isinstance(value, str):
            values[name] = path_of(value)
        if kinds[name] is str and type(value) in (int, float):
            values[name] = str(value)  # latent_grid = 7, temperature = 0.5
    return values


def text_of(path: Path) -> str:
    """A path as TOML has it, in UTF-8 whatever the locale. Raises UnicodeDecodeError."""
    return os.fsencode(path).decode()


def path_of(text: str) -> Path:
    """The path of `text_of`."""
    return Path(os.fsdecode(text.encode()))


@contextmanager
def read_from(path: Path, names: Container[str]) -> Iterator[None]:
    """Have a ConfigError about one of these settings name the file that they stand in."""
    try:
        yield
    except ConfigError as error:
        if str(error).partition(":")[0] not in names:
            raise
        raise ConfigError(f"{path}: {error}") from error


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """ ", did you mean …?" for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless the value is of the class, or one of the Literal's."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}")
    elif not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is not {KINDS[kind]}")


def check(settings: Any, names: str, allowed: Callable[[Any], object], text: str) -> None:
    """Raise ConfigError unless each of the named settings (a b c) is open or allowed."""
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not allowed(value):
            raise ConfigError(f"{name}: {value} is not allowed; it must be {text}")


def check_idle(settings: Any, other: str, needed: Sequence[str], *names: str) -> None:
    """Raise ConfigError for one of the names that does nothing, for `other` is not as needed.

    Its default does not count as given: every config.toml has it.
    """
    found = getattr(settings, other)
    if found is None or found in needed:
        return
    for name in names:
        value = getattr(settings, name)
        defaults = settings.__dataclass_fields__[name].metadata["defaults"]
        if value not in (None, defaults.get(settings.model)):
            raise ConfigError(
                f"{name}: {value} does not apply to {other} {found}, only to {', '.join(needed)}"
            )
