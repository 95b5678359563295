"""One folder, one run: each process of it holds the part of the folder that is its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkd.errors import ConfigError
from alignkd.pipeline.runtime.out_folder.holder import parse_holder
from alignkd.pipeline.runtime.out_folder.lock import NAME, held
from alignkd.pipeline.runtime.ranks import Worker

_OTHERS = "processes"


@contextmanager
def holding(out: Path, worker: Worker, check_stop: Callable[[], None]) -> Iterator[None]:
    """Hold a folder as one of the processes of a run: the first holds all of it, the others a name below it each.

    Raises:
        ConfigError: a living run holds it, or one of more processes has some that are at work.
    """
    for path in (out / _OTHERS).glob(f"*/{NAME}"):
        rank = path.parent.name
        found = parse_holder(path.read_bytes()) if rank.isdecimal() and int(rank) >= worker.world_size else None
        if found is not None and found.is_alive():
            raise ConfigError(
                f"--out {out} is in use by another run: {found}. Wait until it ends, stop it, or choose another --out"
            )
    if worker.rank == 0:
        with held(out, check_stop):
            yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with held(out / _OTHERS / str(worker.rank), check_stop):
        yield
