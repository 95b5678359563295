"""Help in sections, and the names of options that users of similar tools type."""

from __future__ import annotations

import re

import click
import pytest

from alignkd.cli import main
from alignkd.settings import GROUPS

REQUIRED = {
    "cache-teacher": ["--teacher", "t", "--data", "d", "--cache", "c"],
    "distill": ["--student", "s", "--data", "d", "--out", "o"],
    "evaluate": ["--model", "m", "--data", "d"],
    "show": ["--model", "m", "--data", "d"],
    "chat": ["m"],
    "demo": ["--out", "o"],
    "report": ["run", "--to", "t"],
    "push": ["run", "org/model"],
    "new-student": ["--language-model", "l", "--tower", "t", "--out", "o"],
}


def context():
    return click.Context(main, info_name="alignkd", **main.context_settings)


def parse(name, *words):
    words = [*REQUIRED[name], *map(str, words)]
    return main.get_command(context(), name).make_context(name, words, parent=context()).params


def help_of(name):
    parent = context()
    command = main.get_command(parent, name)
    return command.get_help(click.Context(command, info_name=name, parent=parent))


def sections(text):
    """The options that each section of a help text shows."""
    found, title = {}, ""
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z][a-z ]+:", line):
            title = line[:-1].lower()
        elif match := re.match(r"  (?:-h, )?(--[a-z-]+)", line):
            found.setdefault(title, []).append(match[1])
    return found


@pytest.mark.parametrize("name", REQUIRED)
def test_help_shows_every_option_in_one_section_of_the_known_ones_in_their_order(name):
    found = sections(help_of(name))
    assert list(found) == [group for group in GROUPS if group in found]
    shown = [option for options in found.values() for option in options]
    command = main.get_command(context(), name)
    assert sorted(shown) == sorted({p.opts[0] for p in command.params if isinstance(p, click.Option)} | {"--help"})


def test_help_shows_an_option_where_a_user_looks_for_it():
    teacher, distill = sections(help_of("cache-teacher")), sections(help_of("distill"))
    for found, group, options in (
        (teacher, "data", {"--data", "--images", "--max-length"}),
        (teacher, "model", {"--teacher", "--dtype", "--device"}),
        (teacher, "targets", {"--targets", "--top-k", "--attention-codec"}),
        (teacher, "storage", {"--cache", "--format", "--shard-samples"}),
        (teacher, "many machines", {"--rank", "--world-size", "--engine"}),
        (distill, "training", {"--learning-rate", "--batch-size", "--epochs"}),
        (distill, "targets", {"--recipe", "--set"}),
        (distill, "many machines", {"--deepspeed"}),
    ):
        assert options <= set(found[group]), group


ALIASES = [
    ("distill", "--lr", 1e-3, "learning_rate"),
    ("distill", "--learning_rate", 1e-3, "learning_rate"),
    ("distill", "--bs", 8, "batch_size"),
    ("distill", "--per_device_train_batch_size", 8, "batch_size"),
    ("distill", "--gradient_accumulation_steps", 4, "gradient_accumulation"),
    ("distill", "--num_train_epochs", 3.0, "epochs"),
    ("distill", "--wd", 0.1, "weight_decay"),
    ("distill", "--warmup-ratio", 0.1, "warmup"),
    ("distill", "--mm_projector_lr", 1e-4, "projector_learning_rate"),
    ("distill", "--output_dir", "there", "out"),
    ("distill", "--data_path", "d.json", "data"),
    ("distill", "--image_folder", "pictures", "images"),
    ("cache-teacher", "--model_max_length", 512, "max_length"),
    ("evaluate", "--bs", 8, "batch_size"),
]


@pytest.mark.parametrize(("name", "option", "value", "field"), ALIASES)
def test_names_that_users_of_similar_tools_type_are_taken(name, option, value, field):
    found = parse(name, option, value)[field]
    assert (found[-1] if isinstance(found, tuple) else found) == value  # an option that may be repeated has all its values


def test_help_shows_short_names_and_keeps_long_ones_for_the_documentation():
    text = help_of("distill")
    assert "--learning-rate, --lr " in text
    assert "--batch-size, --bs " in text
    assert "--per-device-train-batch-size" not in text


def test_a_name_close_to_an_option_is_answered_with_the_option():
    with pytest.raises(click.NoSuchOption) as refused:
        parse("distill", "--leaning-rate", 1)
    assert "--learning-rate" in refused.value.format_message()
