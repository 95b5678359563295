"""What an option needs beyond the package is asked for in one line, before anything is loaded or written."""

from __future__ import annotations

import json
import sys

import pytest
from fsspec.registry import _registry
from tiny_runs import GOLDEN, TEACHER, stage_two_config, with_file

from alignkd.cache_store.storage import open_storage
from alignkd.errors import ConfigError
from alignkd.extras import require
from alignkd.models.encoders import processors
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.demo import DemoConfig
from alignkd.pipeline.demo.run import demo
from alignkd.pipeline.training import run_inputs
from alignkd.pipeline.training.run import distill


@pytest.fixture
def without(monkeypatch):
    """As if a package were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "settings", "words"),
    [
        ("peft", {"lora": True}, r"--lora needs the package peft, .*: pip install 'alignkd\[lora\]'"),
        (
            "deepspeed",
            {"deepspeed": "zero2"},
            r"--deepspeed needs the package deepspeed, .*'alignkd\[deepspeed\]'",
        ),
        ("wandb", {"report_to": ("wandb",)}, r"--report-to wandb needs the package wandb, .*: pip install 'alignkd\[wandb\]'"),
        ("mlflow", {"report_to": ("mlflow",)}, r"--report-to mlflow needs the package mlflow, .*: pip install mlflow"),
        ("tensorboard", {}, r"give --report-to none\) needs the package tensorboard, .*: pip install tensorboard"),
    ],
)
def test_an_option_of_stage_two_is_refused_before_the_student_is_loaded(
    data, tmp_path, monkeypatch, without, package, settings, words
):
    without(package)
    monkeypatch.setattr(run_inputs, "load_vlm", lambda *_, **__: pytest.fail("the student was loaded"))
    with pytest.raises(ConfigError, match=words) as error:
        distill(stage_two_config(data, None, tmp_path / "out", recipe="sft", **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_nobody_knows_is_refused_with_the_nearest(data, tmp_path):
    with pytest.raises(ConfigError, match=r"knows no tracker of this name; did you mean wandb\?"):
        distill(stage_two_config(data, None, tmp_path / "out", recipe="sft", report_to=("wandbb",)))


@pytest.mark.parametrize(("url", "package", "extra"), [("s3://b/c", "s3fs", "s3"), ("gs://b/c", "gcsfs", "gcs")])
def test_a_store_names_its_extra(without, monkeypatch, url, package, extra):
    without(package)
    for name in ("s3", "gs"):  # fsspec keeps those that another test has loaded
        monkeypatch.delitem(_registry, name, raising=False)
    with pytest.raises(ConfigError, match=rf"needs the package {package}, .*: pip install 'alignkd\[{extra}\]'"):
        open_storage(url)


def test_a_quantised_checkpoint_names_its_package(without, tmp_path):
    without("bitsandbytes")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = with_file(TEACHER, tmp_path / "teacher", "config.json", quantization_config=settings)
    with pytest.raises(
        ConfigError, match=r"quantised \(bitsandbytes\), needs the package bitsandbytes, .*alignkd\[quantized\]"
    ):
        load_vlm(folder)


def test_the_demo_asks_for_its_data_before_it_writes_anything(without, tmp_path):
    without("easy_vqa")
    with pytest.raises(ConfigError, match=r"alignkd demo needs the package easy_vqa, .*: pip install 'alignkd\[demo\]'"):
        demo(DemoConfig(out=str(tmp_path / "demo")))
    assert not (tmp_path / "demo").exists()


def test_the_processor_of_smolvlm_names_its_extra(without, tmp_path):
    without("num2words")
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "SmolVLMProcessor"}))
    with pytest.raises(ConfigError, match=r"needs the package num2words, .*: pip install 'alignkd\[smolvlm\]'"):
        processors.load_processor(tmp_path, "smolvlm")


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "inspect", "no-such-cache", "--id", "0", "--plot", "row.png"],
        ["show", "--model", "no-such-model", "--data", GOLDEN / "samples.json", "--id", "0", "--plot", "a.png"],
    ],
)
def test_a_plot_asks_for_matplotlib_first(without, arguments):
    from click.testing import CliRunner

    from alignkd.cli import main

    without("matplotlib")
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "--plot needs the package matplotlib" in result.output


def test_what_is_installed_passes():
    require("json", "--anything")
