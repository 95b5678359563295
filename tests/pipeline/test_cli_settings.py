"""Settings and DeepSpeed configurations, shipped or the user's; and the commands of docs/reproduce.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
import yaml
from tiny_runs import GOLDEN, IMAGES, STUDENT, TEACHER
from transformers import LlamaForCausalLM

from alignkd.cli import main
from alignkd.models.checkpoints.tokenizer_files import copy_tokenizer
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.presets import COMMANDS, SHIPPED, read_settings
from alignkd.pipeline.training.deepspeed_configs import SHIPPED as ZERO
from alignkd.pipeline.training.deepspeed_configs import read_deepspeed_config

ROOT = Path(__file__).parents[2]
REQUIRED = {
    "cache-teacher": ["--teacher", "t", "--data", "d", "--cache", "c"],
    "distill": ["--student", "s", "--data", "d", "--out", "o"],
}


def parse(command, *words):
    """The parameters that click makes of a command line, without running it."""
    context = click.Context(main, info_name="alignkd", help_option_names=["-h", "--help"], show_default=True)
    return main.get_command(context, command).make_context(command, [str(word) for word in words], parent=context).params


def help_of(door, *words):
    finished = door(*words)
    assert finished.code == 0, finished.stderr
    return " ".join(finished.stdout.split())


def with_file(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_setting_is_an_option_s_default(command, name):
    found = parse(command, *REQUIRED[command], "--settings", name)
    plain = parse(command, *REQUIRED[command])
    written = yaml.safe_load((ROOT / "pipeline" / "config" / "presets" / f"{name}.yaml").read_text())[command]
    assert len(written) >= 3
    for option, value in written.items():
        assert found[option.replace("-", "_")] == value
    changed = {key for key in found if found[key] != plain[key]}
    assert changed <= {option.replace("-", "_") for option in written}


@pytest.mark.parametrize("name", SHIPPED)
def test_both_stages_of_a_setting_agree_on_what_the_cache_is_refused_for(name):
    first, second = (read_settings(name, command) for command in COMMANDS)
    assert {key: first[key] for key in ("template", "max-length")} == {key: second[key] for key in ("template", "max-length")}


@pytest.mark.parametrize(
    ("name", "template", "ids", "rate", "projector", "samples_a_step"),
    [
        ("pretrain-short", "plain", 512, 2e-5, 1e-3, 256),
        ("pretrain-long", "plain", 2048, 2e-5, 1e-3, 256),
        ("tune-short", "v1", 512, 4e-5, None, 128),
        ("tune-long", "v1", 2048, 4e-5, None, 128),
    ],
)
def test_the_papers_stages_are_shipped(name, template, ids, rate, projector, samples_a_step):
    found = parse("distill", *REQUIRED["distill"], "--settings", name)
    assert (found["template"], found["max_length"], found["epochs"], found["warmup"]) == (template, ids, 1.0, 0.03)
    assert (found["learning_rate"], found["projector_learning_rate"], found["weight_decay"]) == (rate, projector, 0.0)
    assert 8 * found["batch_size"] * found["gradient_accumulation"] == samples_a_step
    assert found["gradient_checkpointing"] == name.endswith("long")


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_command_line_wins_over_settings(order):
    settings, own = ["--settings", "tune-long"], ["--learning-rate", "1e-4", "--no-gradient-checkpointing", "--batch-size", 2]
    words = settings + own if order == "before" else own + settings
    found = parse("distill", *REQUIRED["distill"], *words)
    assert (found["learning_rate"], found["gradient_checkpointing"], found["batch_size"]) == (1e-4, False, 2)
    assert (found["max_length"], found["dtype"]) == (2048, "bfloat16")


@pytest.mark.parametrize("words", [["--settings", "pretrain-long", "--help"], ["--help", "--settings", "pretrain-long"]])
def test_help_shows_the_defaults_in_force(door, words):
    shown = help_of(door, "distill", *words)
    assert "[default: 2e-05; x>=0]" in shown
    assert "[default: gradient-checkpointing]" in shown
    assert "Prompt template. [default: plain]" in shown
    usual = help_of(door, "distill", "--help")
    assert "[default: 4e-05; x>=0]" in usual
    assert "Prompt template. [default: the model's]" in usual


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_all_shipped_settings(door, command):
    shown = help_of(door, command, "--help")
    assert all(name in shown for name in SHIPPED)


def test_a_settings_file_may_hold_required_and_repeated_options(tmp_path):
    own = with_file(
        tmp_path / "mine.yaml",
        "distill:\n  student: s\n  data: d.json\n  out: o\n  learning-rate: 1e-3\n  set: [attention=0.5, focus_k=4]\n",
    )
    found = parse("distill", "--settings", own)
    assert (found["student"], found["data"], found["out"], found["learning_rate"]) == ("s", "d.json", "o", 1e-3)
    assert found["overrides"] == ("attention=0.5", "focus_k=4")


REFUSED = {
    "unknown settings": (lambda t: "best", ["settings 'best' are not known", "pretrain-short", "FILE.yaml"]),
    "no such file": (lambda t: t / "none.yaml", ["none.yaml: No such file"]),
    "no YAML": (lambda t: with_file(t / "s.yaml", "a: [1"), ["s.yaml is not YAML"]),
    "no sections": (lambda t: with_file(t / "s.yaml", "- 1"), ["holds list, expected sections of options"]),
    "an option outside a section": (
        lambda t: with_file(t / "s.yaml", "learning-rate: 1\ndistill: {seed: 1}"),
        ["unknown learning-rate", "expected sections of options, of answer, ", "cache-teacher", "distill"],
    ),
    "no section for the command": (
        lambda t: with_file(t / "s.yaml", "cache-teacher: {dtype: bfloat16}"),
        ["holds no options for distill"],
    ),
    "unknown options": (
        lambda t: with_file(t / "s.yaml", "distill: {learning_rate: 1, speed: 2}"),
        ["learning_rate, speed cannot be set for distill (did you mean learning-rate"],
    ),
    "a section of a misspelt command": (
        lambda t: with_file(t / "s.yaml", "distil: {seed: 1}\ndistill: {seed: 1}"),
        ["unknown distil (did you mean distill?)"],
    ),
    "one option by two names": (
        lambda t: with_file(t / "s.yaml", "distill: {lr: 1, learning-rate: 2}"),
        ["lr and learning-rate are one option; set one of them"],
    ),
    "shipped settings misspelt": (lambda t: "tune-shrt", ["settings 'tune-shrt' are not known (did you mean tune-short?)"]),
    "an option that a command line cannot undo": (
        lambda t: with_file(t / "s.yaml", "distill: {resume: true}"),
        ["resume cannot be set for distill"],
    ),
    "settings in settings": (
        lambda t: with_file(t / "s.yaml", "distill: {settings: tune-long}"),
        ["settings cannot be set for distill"],
    ),
    "a value of another kind": (
        lambda t: with_file(t / "s.yaml", "distill: {batch-size: many}"),
        ["s.yaml: batch-size: 'many' is not a valid integer range"],
    ),
    "a value out of range": (lambda t: with_file(t / "s.yaml", "distill: {batch-size: 0}"), ["batch-size: 0 is not in the"]),
    "no choice": (lambda t: with_file(t / "s.yaml", "distill: {dtype: int8}"), ["dtype: 'int8' is not one of"]),
    "a switch that is no truth": (
        lambda t: with_file(t / "s.yaml", "distill: {gradient-checkpointing: 2}"),
        ["gradient-checkpointing is 2, expected true or false"],
    ),
    "a truth where a number belongs": (
        lambda t: with_file(t / "s.yaml", "distill: {batch-size: true}"),
        ["batch-size is True, expected a text or a number"],
    ),
    "nothing": (lambda t: with_file(t / "s.yaml", "distill: {batch-size: }"), ["batch-size is None, expected"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_used_are_refused_by_name(door, tmp_path, name):
    make, parts = REFUSED[name]
    finished = door("distill", *REQUIRED["distill"], "--settings", make(tmp_path))
    assert finished.code == 2
    assert "Traceback" not in finished.stderr
    for part in parts:
        assert part in finished.stderr, finished.stderr


def test_one_file_runs_both_stages(door, tmp_path, data):
    own = with_file(
        tmp_path / "both.yaml",
        "cache-teacher: {template: v1, max-length: 300, shard-samples: 2}\n"
        "distill: {max-steps: 1, batch-size: 2, log-steps: 1, workers: 0, recipe: logits-only}\n",
    )
    cache, out = tmp_path / "cache", tmp_path / "out"
    common = ["--data", data, "--images", IMAGES, "--device", "cpu", "--settings", own, "--json"]
    first = door("cache-teacher", "--teacher", TEACHER, "--cache", cache, *common)
    assert first.code == 0, first.stderr
    assert json.loads(first.stdout)["shards"] == 3
    second = door("distill", "--student", STUDENT, "--cache", cache, "--out", out, *common)
    assert second.code == 0, second.stderr
    resolved = json.loads((out / "run.json").read_text())["configuration"]
    assert (resolved["max_length"], resolved["batch_size"], resolved["recipe"]["name"]) == (300, 2, "logits-only")
    assert json.loads(second.stdout)["steps"] == 1


class TestDeepSpeed:
    @pytest.mark.parametrize("name", ZERO)
    def test_a_shipped_configuration_is_of_its_stage_and_brings_no_optimizer(self, name):
        found = read_deepspeed_config(name)
        assert found["zero_optimization"]["stage"] == int(name.removeprefix("zero"))
        assert not {"optimizer", "scheduler"} & set(found)
        assert found["zero_allow_untested_optimizer"] is True

    def test_three_stages_are_shipped(self):
        assert ZERO == ("zero1", "zero2", "zero3")

    @pytest.mark.parametrize("name", ZERO)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_the_trainer_fills_in_every_auto_for_a_model_without_a_configuration(self, tmp_path, name, dtype):
        from transformers import TrainingArguments
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            use_cpu=True,
        )
        config = HfTrainerDeepSpeedConfig(read_deepspeed_config(name))
        try:
            config.trainer_config_process(arguments)
            config.trainer_config_finalize(arguments, torch.nn.Linear(2, 2), 10)
        finally:
            unset_hf_deepspeed_config()
        filled = config.config
        assert "auto" not in json.dumps(filled)
        assert (filled["train_batch_size"], filled["gradient_clipping"]) == (16, 1.0)
        assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (dtype == "bfloat16", dtype == "float16")

    def test_a_file_of_the_user_s_own_is_taken(self, tmp_path):
        own = with_file(tmp_path / "own.json", "{}")
        assert read_deepspeed_config(str(own)) == json.loads(own.read_text())

    @pytest.mark.parametrize(
        ("name", "text", "part"),
        [
            ("zero4", None, "zero4: known are zero1, zero2, zero3, or a FILE.json"),
            ("none.json", None, "none.json: No such file"),
            ("own.json", "{", "own.json is not JSON"),
            ("own.json", "[]", "own.json holds list, expected an object"),
            ("own.json", "[" * 100_000, "own.json is not JSON"),
            ("own.json", '{"zero_optimization": 2}', "zero_optimization is 2, expected an object whose 'stage'"),
            ("own.json", '{"zero_optimization": {"stage": "two"}}', "whose 'stage' is 0, 1, 2 or 3"),
        ],
    )
    def test_what_is_no_configuration_is_refused(self, tmp_path, name, text, part):
        given = str(with_file(tmp_path / name, text)) if text else str(tmp_path / name) if "." in name else name
        with pytest.raises(ValueError, match=re.escape(part)):
            read_deepspeed_config(given)


REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text()


def commands(text):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return [shlex.split(words) for words in re.findall(r"\balignkd (.*)$", re.sub(r"\\\n\s*", " ", blocks), re.MULTILINE)]


@pytest.mark.parametrize("words", commands(REPRODUCE), ids=lambda words: " ".join(words[:4]))
def test_every_command_of_the_walk_through_is_one_that_alignkd_takes(words):
    context, command, arguments = click.Context(main), main, words
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
    assert command.make_context("x", arguments, parent=context).params


def test_the_walk_through_holds_both_stages_of_both_phases():
    said = [" ".join(words) for words in commands(REPRODUCE)]
    for command in COMMANDS:
        assert {name for line in said if line.startswith(command) for name in SHIPPED if name in line} >= {
            "pretrain-short",
            "tune-short",
        }


def test_the_walk_through_s_student_starts_from_the_language_model_with_a_new_projector(tmp_path, monkeypatch, student_vlm):
    shutil.copytree(GOLDEN / "clip", tmp_path / "clip-vit-large-patch14-336")
    torch.manual_seed(1)
    language = LlamaForCausalLM(student_vlm.model.config.text_config)
    language.save_pretrained(tmp_path / "MobileLLaMA-1.4B-Chat")
    copy_tokenizer(STUDENT, tmp_path / "MobileLLaMA-1.4B-Chat")
    monkeypatch.chdir(tmp_path)
    (words,) = (words for words in commands(REPRODUCE) if words[0] == "new-student")
    main(words, standalone_mode=False)
    before, after = student_vlm.model.state_dict(), load_vlm(tmp_path / "student-start").model.state_dict()
    of_language = {name.replace("model.", "model.language_model.", 1): t for name, t in language.state_dict().items()}
    for name, tensor in after.items():
        expected = of_language.get(name, before[name])
        if "multi_modal_projector" in name and tensor.ndim > 1:
            assert not torch.equal(tensor, before[name]), name
        elif "multi_modal_projector" not in name:
            assert torch.equal(tensor, expected), name
    assert set(of_language) <= set(after)


def test_every_option_of_distill_is_a_field_of_its_configuration():
    from alignkd.pipeline.config.distill import DistillConfig
    from alignkd.pipeline.config.log import LogConfig

    options = {p.name for p in main.get_command(click.Context(main), "distill").params if p.expose_value}
    known = {field.name for config in (DistillConfig, LogConfig) for field in fields(config)}
    assert options - {"overrides", "as_json"} <= known


def every_command(group=main, *before):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield from every_command(command, *before, name) if isinstance(command, click.Group) else [(*before, name)]


EXAMPLE = yaml.safe_load((ROOT / "examples" / "settings.yaml").read_text())


def parse_any(words, *arguments):
    context, command = click.Context(main, **main.context_settings), main
    for word in words:
        command = command.get_command(context, word)
        context = click.Context(command, parent=context) if isinstance(command, click.Group) else context
    return command.make_context(words[-1], [str(one) for one in arguments], parent=context).params


@pytest.mark.parametrize("section", EXAMPLE)
def test_the_example_file_is_taken_by_every_command_that_it_has_a_section_for(section):
    words = section.split()
    urls = ["url"] if words[0] == "cache" else []
    found = parse_any(words, *urls, "--settings", ROOT / "examples" / "settings.yaml")
    for option, value in EXAMPLE[section].items():
        name = {"set": "overrides"}.get(option, option.replace("-", "_"))
        shown = found.get(name)
        assert shown in (value, tuple(value) if isinstance(value, list) else value) or ",".join(shown) == value


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_every_command_takes_a_settings_file_and_refuses_what_it_does_not_know(door, tmp_path, words):
    own = with_file(tmp_path / "s.yaml", f"{' '.join(words)}: {{best-option: 1}}")
    refused = door(*words, "--settings", own)
    assert refused.code == 2
    assert f"best-option cannot be set for {' '.join(words)}" in refused.stderr, refused.stderr
    assert "--settings" in help_of(door, *words, "--help")


def test_other_names_of_options_serve_in_a_settings_file(tmp_path):
    own = with_file(tmp_path / "s.yaml", "distill: {lr: 1.0e-3, bs: 4, student: s, data-path: d, output-dir: o}")
    found = parse("distill", "--settings", own)
    assert (found["learning_rate"], found["batch_size"], found["data"], found["out"]) == (1e-3, 4, "d", "o")


def test_the_page_lists_every_other_name_of_an_option():
    page = (ROOT / "docs" / "command-line.md").read_text()
    for words in (["distill"], ["cache-teacher"], ["evaluate"], ["show"]):
        for option in main.get_command(click.Context(main), words[0]).params:
            assert all(f"`{name}`" in page for name in option.opts[1:]), option.opts
