"""Settings: defaults for the options of a command, from a file that is shipped or the user's.

One file serves all commands: a section each, options without their dashes. What the command line gives wins.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.plain_files import read_plain

COMMANDS = ("cache-teacher", "distill")
"""The commands that the shipped settings have sections for."""

_MAX_BYTES = 16 * 2**20
_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def read_settings(name_or_file: str, command: str, known: Callable[[], Iterable[str]] = lambda: COMMANDS) -> dict[str, Any]:
    """The section of ``command``: option names without dashes, to values. ``known``: the sections that a file may have.

    Raises:
        ConfigError: no such settings, no YAML, an unknown section, or none for this command.
    """
    path, sections = _sections(name_or_file)
    if not isinstance(sections.get(command), dict) or not set(sections) <= set(COMMANDS):
        names = list(known())
        expected = f"expected sections of options, of {', '.join(names)}"
        unknown = [str(name) for name in sections if name not in names]
        if unknown:
            raise ConfigError(f"settings file {path}: unknown {', '.join(unknown)}{did_you_mean(unknown, names)}; {expected}")
    if not isinstance(sections.get(command), dict):
        raise ConfigError(f"settings file {path} holds no options for {command}; it has {', '.join(map(str, sections))}")
    return {str(name): value for name, value in sections[command].items()}


def section_names(name_or_file: str) -> tuple[str, ...]:
    """The sections of a settings file.

    Raises:
        ConfigError: no such settings, or no YAML.
    """
    return tuple(map(str, _sections(name_or_file)[1]))


def _sections(name_or_file: str) -> tuple[Path, dict[Any, Any]]:
    import yaml  # only here: every command's help asks this module for the names of settings

    path = _find(name_or_file)
    try:
        sections = yaml.safe_load(read_plain(path, _MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"settings file {path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(
            f"settings file {path} holds {type(sections).__name__}, expected sections of options, each named like its command"
        )
    return path, sections


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Words about the known name that is nearest to each unknown one; empty where none is near."""
    names = list(known)
    nearest = [get_close_matches(name.replace("_", "-").lstrip("-"), names, n=1) for name in unknown]
    found = [matches[0] for matches in nearest if matches]
    return f" (did you mean {', '.join(found)}?)" if found else ""


def _find(name_or_file: str) -> Path:
    if Path(name_or_file).suffix in (".yaml", ".yml"):
        return Path(name_or_file)
    if name_or_file in SHIPPED:
        return _FOLDER / f"{name_or_file}.yaml"
    meant = did_you_mean([name_or_file], SHIPPED)
    raise ConfigError(f"settings {name_or_file!r} are not known{meant}; known are {', '.join(SHIPPED)}, or a FILE.yaml")
