"""Where a run's targets come from: a cache, a teacher in the loop, or no teacher at all."""

from typing import NamedTuple

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.layer_pairs import needed_layers
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.errors import CacheError, wrap_errors
from alignkd.models.loading import load_vlm
from alignkd.objective import TargetSource, TeacherShape
from alignkd.pipeline.cache_io.compatibility import check_online_teacher
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.teacher_slice import open_slice
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.runtime.devices import parse_dtype
from alignkd.pipeline.training.run_inputs import RunInputs
from alignkd.targets.logits import LogitCodec


class Teacher(NamedTuple):
    """What the objective needs to know. ``source`` makes targets in the loop, None where batches bring all of them."""

    source: TargetSource | None
    logit_codec: LogitCodec | None
    shape: TeacherShape | None


def open_teacher(inputs: RunInputs) -> Teacher:
    """The teacher in the loop if one is given, else what the cache holds of its teacher; with neither, nothing.

    Raises:
        AlignkdError: a teacher that cannot be loaded or does not match the student, or a cache that does not describe its own.
    """
    if inputs.config.online_teacher is not None:
        return _in_the_loop(inputs, inputs.config.online_teacher)
    if inputs.reader is not None:
        return _in_the_cache(inputs, inputs.reader)
    return Teacher(None, None, None)


def _in_the_cache(inputs: RunInputs, reader: CacheReader) -> Teacher:
    found, codec = reader.fingerprint, None
    source = open_slice(reader, inputs.student, inputs.needs, features_only=inputs.config.cache_tower_features)
    if "logits" in inputs.needs:
        codec = open_codec(settings_of(found), reader.tensors, inputs.student.device)
    unreadable = f"the fingerprint of the cache at {reader.url} is damaged: write the cache again"
    with wrap_errors(CacheError, unreadable, KeyError, TypeError):
        heads = 1 if found["targets"]["attention"] == "mean" else found["teacher"]["heads"]
        return Teacher(source, codec, TeacherShape(heads, found["teacher"]["width"], inputs.teacher_layers))


def _in_the_loop(inputs: RunInputs, folder: str) -> Teacher:
    config = inputs.config
    dtype = parse_dtype(config.teacher_dtype or config.dtype)
    tower = tower_folder(config.vision_tower)
    teacher = load_vlm(model_folder(folder), dtype=dtype, device=inputs.device, vision_tower=tower)
    check_online_teacher(inputs.student, teacher, inputs.template)
    layers = needed_layers(config.recipe, inputs.student, teacher.layers)
    source = OnlineTeacher(teacher, inputs.student, features_only=config.cache_tower_features, attention_layers=layers)
    return Teacher(source, source.logit_codec, TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers))
