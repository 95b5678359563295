"""Where the vision tokens of a run's student come from: its tower and the images, or the cache of its teacher's."""

from collections.abc import Sequence

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import ConfigError
from alignkd.pipeline.config.cache_layout import is_slice
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.shared import several

TOWER_FILE = "tower.safetensors"
"""In the run's folder while it trains from cached tokens: the tower, which is not kept in memory."""


def takes_cached_tokens(config: DistillConfig, readers: Sequence[CacheReader]) -> bool:
    """Whether the run needs neither images nor tower, since its student sees the teacher's cached vision tokens.

    Raises:
        ConfigError: ``--vision-input cache`` cannot be had; says why.
    """
    if config.vision_input == "tower":
        return False
    reason = _why_not(config, readers)
    if reason and config.vision_input == "cache":
        raise ConfigError(f"--vision-input cache {reason}; or use --vision-input tower")
    return not reason


def _why_not(config: DistillConfig, readers: Sequence[CacheReader]) -> str:
    if config.recipe.projector != "teacher":
        return "needs a student that sees through its teacher's projector: use a recipe with projector teacher"
    if config.online_teacher is not None or len(readers) != 1:
        return "needs the cache of one teacher: give one --cache and no --online-teacher"
    targets = readers[0].fingerprint["targets"]
    if is_slice(readers[0].fingerprint) or not targets.get("vision"):
        return f"needs vision tokens in the rows of the cache at {readers[0].url}: cache with --targets that include vision"
    if config.eval_benchmark:
        return "leaves the tower out of memory, which --eval-benchmark needs: leave that out"
    if config.eval_data is not None and not several(config.eval_cache):
        return "needs the vision tokens of the held-out samples as well: give --eval-cache"
    return ""
