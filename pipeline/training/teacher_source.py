"""Where a run's targets come from: a cache, a teacher in the loop, or no teacher at all."""

from alignkd.capture.layer_pairs import needed_layers
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.capture.teacher import Teacher
from alignkd.errors import CacheError, wrap_errors
from alignkd.losses.contract import TeacherShape
from alignkd.models.loading import load_vlm
from alignkd.pipeline.cache_io.compatibility import check_online_teacher
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.open_caches import OpenCache, naming_cache
from alignkd.pipeline.cache_io.teacher_slice import open_slice
from alignkd.pipeline.hub.models import model_folder, tower_folder
from alignkd.pipeline.runtime.devices import parse_dtype
from alignkd.pipeline.training.run_inputs import RunInputs


def open_teachers(inputs: RunInputs) -> tuple[Teacher, ...]:
    """The teacher in the loop if one is given, else what each cache holds of its teacher; with neither, one of nothing.

    Raises:
        AlignkdError: a teacher that cannot be loaded or does not match the student, or a cache that does not describe its own.
    """
    if inputs.config.online_teacher is not None:
        return (_in_the_loop(inputs, inputs.config.online_teacher),)
    found = []
    for cache in inputs.caches:
        with naming_cache(cache.reader, len(inputs.caches)):
            found.append(_in_the_cache(inputs, cache))
    return tuple(found) or (Teacher(None, None, None),)


def _in_the_cache(inputs: RunInputs, cache: OpenCache) -> Teacher:
    reader, codec = cache.reader, None
    found = reader.fingerprint
    source = open_slice(reader, inputs.student, inputs.needs, features_only=inputs.config.cache_tower_features)
    if "logits" in inputs.needs:
        codec = open_codec(settings_of(found), reader.tensors, inputs.student.device)
    unreadable = f"the fingerprint of the cache at {reader.url} is damaged: write the cache again"
    with wrap_errors(CacheError, unreadable, KeyError, TypeError):
        heads = 1 if found["targets"]["attention"] == "mean" else found["teacher"]["heads"]
        return Teacher(source, codec, TeacherShape(heads, found["teacher"]["width"], cache.teacher_layers))


def _in_the_loop(inputs: RunInputs, folder: str) -> Teacher:
    config = inputs.config
    dtype = parse_dtype(config.teacher_dtype or config.dtype)
    tower = tower_folder(config.vision_tower)
    teacher = load_vlm(model_folder(folder), dtype=dtype, device=inputs.device, vision_tower=tower)
    check_online_teacher(inputs.student, teacher, inputs.template)
    layers = needed_layers(config.recipe, inputs.student, teacher.layers)
    source = OnlineTeacher(teacher, inputs.student, features_only=config.cache_tower_features, attention_layers=layers)
    return Teacher(source, source.logit_codec, TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers))
