"""Terms, metrics and model families from outside the package: a Python file that registers them when it is loaded.

Every process of a job loads the same files: each rank, each loader process, each Ray actor. Their SHA-256 is written to
``run.json``, and a run is not resumed with other plugins.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from alignkd.errors import ConfigError
from alignkd.plain_files import read_plain

_MAX_BYTES = 64 * 2**20
_PREFIX = "alignkd_plugin_"


@dataclass(frozen=True)
class Plugin:
    """A plugin that was loaded: its absolute path, and the SHA-256 of the file."""

    path: str
    sha256: str


_LOADED: dict[str, Plugin] = {}


def load_plugins(paths: Iterable[str]) -> tuple[Plugin, ...]:
    """Load each file once per process; all plugins of this process, in the order in which they were loaded.

    Raises:
        ConfigError: a file that cannot be read, that raises an error, or that has changed since it was loaded.
    """
    for path in paths:
        _load(Path(path))
    return loaded_plugins()


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order in which they were loaded."""
    return tuple(_LOADED.values())


def _load(path: Path) -> None:
    try:
        source = read_plain(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"--plugin {path}: {error.strerror}; expected a Python file") from error
    where, digest = str(path.resolve()), hashlib.sha256(source).hexdigest()
    if where in _LOADED:
        if _LOADED[where].sha256 != digest:
            raise ConfigError(f"--plugin {path}: the file has changed since it was loaded; start the program again")
        return
    name = f"{_PREFIX}{digest[:16]}"
    specification = importlib.util.spec_from_file_location(name, where)
    if specification is None or specification.loader is None:
        raise ConfigError(f"--plugin {path}: expected a Python file, with a name that ends in .py")
    module = importlib.util.module_from_spec(specification)
    # Classes of the module can be sent to other processes only if it can be imported by its name.
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"--plugin {path}: {_where(error, module)}{type(error).__name__}: {error}") from error
    _LOADED[where] = Plugin(where, digest)


def _where(error: BaseException, module: ModuleType) -> str:
    """The last line of the plugin itself that took part in an error."""
    if isinstance(error, SyntaxError):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
    return f"line {lines[-1]}: " if lines else ""
