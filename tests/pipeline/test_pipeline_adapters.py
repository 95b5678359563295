"""A run may start from the adapters of another; other adapters are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import train

from alignkd.errors import ConfigError


@pytest.fixture(scope="module")
def finished(data, cache, tmp_path_factory):
    """A run whose adapters have moved."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(data, cache, out, max_steps=2, learning_rate=0.1)
    return out


def adapters(out):
    return load_file(out / "adapters.safetensors")


@pytest.mark.slow
def test_a_run_starts_from_the_adapters_that_another_ended_with(finished, data, cache, tmp_path):
    learned = adapters(finished)
    assert {"head_map.logits"} <= learned.keys()
    assert not any(name.startswith("student.") for name in learned)
    train(data, cache, tmp_path / "out", max_steps=1, learning_rate=0.0, adapters_of=str(finished))
    for name, value in adapters(tmp_path / "out").items():
        torch.testing.assert_close(value, learned[name], rtol=0, atol=0)
    train(data, cache, tmp_path / "fresh", max_steps=1, learning_rate=0.0)
    assert any(not torch.equal(value, learned[name]) for name, value in adapters(tmp_path / "fresh").items())


def _without_a_map(path):
    save_file({name: value for name, value in load_file(path).items() if name != "head_map.logits"}, path)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "no safetensors": lambda path: path.write_bytes(b"\x80\x04pickled"),
    "a map too few": _without_a_map,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_adapters_that_cannot_be_used_are_refused_before_anything_is_written(finished, data, cache, tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes((finished / "adapters.safetensors").read_bytes())
    DAMAGES[kind](folder / "adapters.safetensors")
    with pytest.raises(ConfigError, match=rf"--adapters-of {folder}: "):
        train(data, cache, tmp_path / "out", max_steps=1, adapters_of=str(folder))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_recipe_without_a_teacher_leaves_no_adapters(data, tmp_path):
    train(data, None, tmp_path / "out", recipe="sft", max_steps=1)
    assert not (tmp_path / "out" / "adapters.safetensors").exists()
