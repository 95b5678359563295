"""Configurations declare defaults and ranges once; the command line takes both from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import pytest

from alignkd.cli import main
from alignkd.errors import AlignkdError, ConfigError
from alignkd.pipeline.commands.options.from_config import from_options
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.demo import DemoConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.config.show import ShowConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.settings import setting_of, types_of
from alignkd.targets.logit_settings import LogitSettings

REQUIRED = {
    "cache-teacher": (CacheTeacherConfig, {"teacher": "t", "data": "d", "cache": "c"}),
    "distill": (DistillConfig, {"student": "s", "data": "d", "out": "o"}),
    "evaluate": (EvaluateConfig, {"model": "m", "data": "d"}),
    "show": (ShowConfig, {"model": "m", "data": "d"}),
    "demo": (DemoConfig, {"out": "o"}),
}


def command_of(name):
    return main.get_command(click.Context(main), name)


def parse(name, *words):
    required = [word for key, value in REQUIRED[name][1].items() for word in (f"--{key}", value)]
    return command_of(name).make_context(name, [*required, *map(str, words)]).params


@pytest.mark.parametrize("name", REQUIRED)
def test_a_command_line_without_options_is_the_configuration_without_arguments(name):
    config, required = REQUIRED[name]
    assert from_options(config, parse(name)) == config(**required)


@pytest.mark.parametrize("name", REQUIRED)
def test_every_setting_of_a_configuration_is_an_option_with_its_default_and_help(name):
    options = {option.name: option for option in command_of(name).params}

    def compare(config):
        for field in dataclasses.fields(config):
            declared = setting_of(field)
            if declared is None:
                continue
            if declared.nested:
                compare(types_of(config)[field.name][0])
                continue
            option = options[field.name]
            assert option.help.startswith(declared.help)
            if field.default is dataclasses.MISSING:
                assert option.required
            else:
                found = option.type_cast_value(click.Context(command_of(name)), option.default)
                assert (found or None) == (field.default or None)

    compare(REQUIRED[name][0])


OUT_OF_RANGE = [
    ("cache-teacher", "max_length", -1, "2 or more"),
    ("cache-teacher", "max_length", 1, "2 or more"),
    ("distill", "max_length", 1, "2 or more"),
    ("show", "max_length", 0, "2 or more"),
    ("cache-teacher", "batch_tokens", 0, "1 or more"),
    ("cache-teacher", "dtype", "int8", "one of float32"),
    ("distill", "warmup", 1.5, "0.999 or less"),
    ("distill", "epochs", 0, "more than 0"),
    ("distill", "lora_dropout", 1.0, "less than 1"),
    ("distill", "optimizer", "sgd", "one of adamw, muon"),
    ("evaluate", "max_rejected", -1, "0 or more"),
    ("distill", "seed", -1, "0 or more"),
    ("demo", "seed", 2**32, "4294967295 or less"),
]


@pytest.mark.parametrize(("name", "field", "value", "expected"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_the_configuration_and_by_the_command_line(name, field, value, expected):
    config, required = REQUIRED[name]
    with pytest.raises(ConfigError, match=rf"--{field.replace('_', '-')} is {value!r}: expected {expected}"):
        config(**required, **{field: value})
    with pytest.raises(click.BadParameter):
        parse(name, f"--{field.replace('_', '-')}", value)


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("field", ["epochs", "learning_rate", "weight_decay"])
def test_a_number_that_is_not_finite_is_refused(field, value):
    with pytest.raises((ConfigError, click.BadParameter), match="finite"):
        from_options(DistillConfig, parse("distill", f"--{field.replace('_', '-')}", value))


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", "many"), ("max_steps", 1.5), ("lora", 1), ("save_steps", True), ("seed", None)]
)
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"--{field.replace('_', '-')} is .*: expected (int|float|bool)"):
        DistillConfig(student="s", data="d", out="o", **{field: value})


def test_targets_are_words_that_are_known():
    assert parse("cache-teacher", "--targets", "vision, logits")["targets"] == ("vision", "logits")
    with pytest.raises(click.BadParameter, match="known are attention, vision, logits"):
        parse("cache-teacher", "--targets", "vision,depth")
    with pytest.raises(ConfigError, match="--targets is 'depth'"):
        TargetSettings(targets=("depth",))
    with pytest.raises(AlignkdError, match="--logits is 'all'"):
        LogitSettings("all")


def test_paths_are_taken_as_paths(tmp_path):
    config = EvaluateConfig(model=tmp_path, data=Path("d"), images=tmp_path)
    assert (config.model, config.data) == (str(tmp_path), "d")


def test_no_target_is_no_target_and_not_the_default():
    assert TargetSettings(targets=()).targets == ()
    assert DataSettings(data=("a.json",), images=()).images is None
    assert DataSettings(data=["a.json", "b.json"]).data == ("a.json", "b.json")
