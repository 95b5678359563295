"""Settings: defaults for the options of ``cache-teacher`` and ``distill``, from a file that is shipped or the user's.

One file serves both commands: a section each, options without their dashes. What the command line gives wins.
"""

from pathlib import Path
from typing import Any

import yaml

from alignkd.errors import ConfigError
from alignkd.plain_files import read_plain

COMMANDS = ("cache-teacher", "distill")
_MAX_BYTES = 16 * 2**20
_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def read_settings(name_or_file: str, command: str) -> dict[str, Any]:
    """The section of ``command``: option names without dashes, to values.

    Raises:
        ConfigError: no such settings, no YAML, an unknown section, or none for this command.
    """
    path = _find(name_or_file)
    try:
        sections = yaml.safe_load(read_plain(path, _MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is not YAML: {error}") from error
    expected = f"expected sections of options, of {', '.join(COMMANDS)}"
    if not isinstance(sections, dict):
        raise ConfigError(f"settings file {path} holds {type(sections).__name__}, {expected}")
    unknown = [str(name) for name in sections if name not in COMMANDS]
    if unknown:
        raise ConfigError(f"settings file {path}: unknown {', '.join(unknown)}; {expected}")
    if not isinstance(sections.get(command), dict):
        raise ConfigError(f"settings file {path} holds no options for {command}; {expected}")
    return {str(name): value for name, value in sections[command].items()}


def _find(name_or_file: str) -> Path:
    if Path(name_or_file).suffix in (".yaml", ".yml"):
        return Path(name_or_file)
    if name_or_file in SHIPPED:
        return _FOLDER / f"{name_or_file}.yaml"
    raise ConfigError(f"settings {name_or_file!r} are not known; known are {', '.join(SHIPPED)}, or a FILE.yaml")
