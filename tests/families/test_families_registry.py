"""The registry: records without torch, and families from outside of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignkd.errors import CheckpointError, ConfigError
from alignkd.models import registry
from alignkd.models.families.llava import Llava
from alignkd.models.loading import load_vlm
from alignkd.models.registry import REFUSED, UNLISTED, FamilyRecord, family_class, family_records, find_record, register_family
from alignkd.pipeline.commands.output.models_table import list_models


@pytest.fixture(autouse=True)
def records(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_RECORDS", list(registry._RECORDS))


def test_the_table_of_models_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from alignkd.pipeline.commands.output.models_table import list_models, models_text\n"
        "assert 'qwen3_vl' in models_text(list_models())\n"
        "print(*{'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("record", [*family_records(), UNLISTED], ids=lambda record: record.family)
def test_each_record_names_a_class_that_can_be_loaded(record):
    assert callable(family_class(record).load)
    assert all(find_record(model_type) is record for model_type in record.model_types)


def test_what_no_record_names_is_left_to_transformers():
    assert find_record("vipllava") is UNLISTED


def test_a_registered_family_loads_its_checkpoints_and_is_listed(written, tmp_path, monkeypatch):
    class Ours(Llava):
        pass

    monkeypatch.setattr(registry, "_RECORDS", [r for r in family_records() if r.family != "llava"])
    register_family(FamilyRecord("ours", ("llava",), Ours, without_coordinates="it is a test"))
    vlm = load_vlm(written("llava"))
    assert type(vlm) is Ours
    assert (vlm.family, vlm.without_coordinates) == ("ours", "it is a test")
    assert vlm.without_slice == FamilyRecord("x", ("x",), "x").without_slice
    assert next(entry for entry in list_models() if entry["family"] == "ours")["other students"] == "no: it is a test"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (FamilyRecord("ours", ("gemma3",), "a:B"), "model_type 'gemma3' is registered already, by the family 'gemma3'"),
        (FamilyRecord("gemma3", ("ours",), "a:B"), "family 'gemma3' is registered already"),
        (FamilyRecord("transformers", ("ours",), "a:B"), "family 'transformers' is registered already"),
        (FamilyRecord("ours", ("mllama",), "a:B"), "model_type 'mllama' cannot be registered: its layers"),
        (FamilyRecord("ours", (), "a:B"), "names no model_types"),
    ],
)
def test_what_is_taken_or_refused_cannot_be_registered(record, message):
    with pytest.raises(ConfigError, match=message):
        register_family(record)
    assert record not in family_records()


def test_a_second_registration_is_refused():
    record = FamilyRecord("ours", ("ours",), "a:B")
    register_family(record)
    with pytest.raises(ConfigError, match="registered already"):
        register_family(record)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:Class", "no_such_module:Class cannot be imported"),
        ("alignkd.models.vlm:Nothing", "Nothing cannot be imported"),
        ("alignkd.models.vlm", "expected 'module:Class'"),
    ],
)
def test_a_target_that_is_not_there_is_named(target, message):
    with pytest.raises(ConfigError, match=f"the family 'ours': .*{message}"):
        family_class(FamilyRecord("ours", ("ours",), target))


def test_a_refused_model_is_a_checkpoint_error_with_the_reason():
    for model_type, why in REFUSED.items():
        with pytest.raises(CheckpointError) as raised:
            find_record(model_type)
        assert str(raised.value) == f"model_type {model_type!r} is not supported: {why}"
