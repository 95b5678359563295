"""The plug-in for lmms-eval against a stub of its interface; test_lmms_eval_installed.py runs the program itself."""

from __future__ import annotations

import importlib
import io
import tomllib
from pathlib import Path

import lmms_eval_stub
import pytest
import torch
from PIL import Image
from tiny_runs import IMAGES, STUDENT

from alignkd.errors import AlignkdError, CheckpointError, ConfigError, DataError
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.evaluate.decoding import Decoding
from alignkd.pipeline.evaluate.harness import lmms_eval_manifest, lmms_eval_model
from alignkd.pipeline.evaluate.harness.answering import Asked, batches, cut
from alignkd.pipeline.evaluate.running.generation import answer

ROOT = Path(__file__).parents[2]
NAMES = ["0.png", "1.png", "2.png", "3.png"]


@pytest.fixture
def plugin(monkeypatch):
    """The module as lmms-eval imports it."""
    with monkeypatch.context() as patch:
        lmms_eval_stub.install(patch)
        yield importlib.reload(lmms_eval_model)
    importlib.reload(lmms_eval_model)


def model_of(plugin, documents=(), **given):
    model = plugin.AlignkdModel(**{"pretrained": str(STUDENT), "device": "cpu", **given})
    model.task_dict = {"task": {"test": list(documents)}}
    return model


def documents():
    return [[Image.open(IMAGES / name).convert("RGB")] for name in NAMES] + [[]]


def requests(**settings):
    texts = ["What is it?", "Which colour does the thing in the middle of the picture have?", "Why?", "Where?", "Who are you?"]
    return [lmms_eval_stub.request(text, list, number, **settings) for number, text in enumerate(texts)]


def expected(vlm, tokens):
    """What ``evaluate`` generates for records with these turns."""
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    found = []
    for number, one in enumerate(requests()):
        image = {"image": NAMES[number]} if number < len(NAMES) else {}
        text = ("<image>\n" if image else "") + one.args[0]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "?"}]
        found += answer(vlm, [preparer.question(read_sample({"id": "a", **image, "conversations": turns}))], tokens)
    return found


def test_lmms_eval_finds_the_model_by_the_entry_point(plugin):
    with (ROOT / "pyproject.toml").open("rb") as file:
        points = tomllib.load(file)["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = points["alignkd"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert (manifest.model_id, manifest.chat_class_path) == ("alignkd", None)
    path, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(path), name)
    assert issubclass(found, lmms_eval_stub.Lmms)
    assert found.is_simple


def test_the_module_can_be_read_without_lmms_eval():
    with pytest.raises(ImportError):
        lmms_eval_manifest.manifest()
    assert lmms_eval_model.AlignkdModel.__doc__


@pytest.mark.parametrize("size", [1, 2, "5"])
def test_answers_are_those_of_evaluate_in_the_order_of_the_requests(plugin, size):
    model = model_of(plugin, documents(), batch_size=size)
    answers = model.generate_until(requests(max_new_tokens=6))
    assert answers == expected(model.vlm, 6)
    assert len(set(answers)) > 1
    kept = {request[0]: result for _, request, result in model.cache_hook.kept}
    assert [kept[one.args[0]] for one in requests()] == answers


def test_what_a_task_says_of_decoding_is_done(plugin):
    model = model_of(plugin, documents(), batch_size=5, max_new_tokens=3)
    asked = requests()
    whole = model.generate_until(asked)
    assert whole == expected(model.vlm, 3)
    some = whole[0][1:2]
    assert model.generate_until(requests(until=some))[0] == whole[0].partition(some)[0].strip()
    mixed = [*requests(max_new_tokens=3)[:2], *requests(max_new_tokens=1)[2:]]
    assert model.generate_until(mixed) == whole[:2] + expected(model.vlm, 1)[2:]


def test_a_temperature_samples(plugin):
    model, found = model_of(plugin, documents(), batch_size=5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate_until(requests(max_new_tokens=6, temperature=1.0, top_p=0.95)))
    assert found[0] == found[1] != found[2]


def test_kinds_of_tasks_that_are_not_supported_say_so(plugin):
    model = model_of(plugin)
    with pytest.raises(NotImplementedError, match="gives no log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"pretrained": ""}, ConfigError, "no pretrained=DIR"),
        ({"pretrained": "/none"}, CheckpointError, "/none is not a folder"),
        ({"colour": "red", "size": 3}, ConfigError, "unknown colour, size; expected pretrained=DIR"),
        ({"batch_size": "auto"}, ConfigError, "batch_size is 'auto', expected a whole number"),
        ({"dtype": "auto"}, ConfigError, "dtype 'auto' is not known; expected float32"),
        ({"template": "chat"}, ConfigError, "known are v1, plain"),
    ],
)
def test_arguments_that_are_wrong_are_refused(plugin, given, kind, message):
    with pytest.raises(kind, match=message):
        model_of(plugin, **given)


@pytest.mark.parametrize(
    ("document", "text", "settings", "message"),
    [
        (["clip.mp4"], "What?", {}, "task task, document 0 shows 'clip.mp4'; expected pictures"),
        ([Image.new("RGB", (8, 8))], "<image> and <image>", {}, "has <image> 2 times, and there are 1 pictures"),
        ([], "What?", {"num_beams": 3}, "num_beams is 3, expected 1"),
        ([], "What?", {"until": 3}, "until is 3, expected a text or a list of texts"),
        ([], "What?", {"until": [3]}, "expected a text or a list of texts"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_by_name(plugin, document, text, settings, message):
    model = model_of(plugin, [document])
    with pytest.raises(AlignkdError, match=message):
        model.generate_until([lmms_eval_stub.request(text, list, **settings)])


def test_pictures_are_opened_when_their_batch_is_made_and_are_given_up_after_it(plugin):
    model, opened = model_of(plugin, documents(), batch_size=2), []
    asked = [lmms_eval_stub.request("Why?" + "!" * number, list, number, max_new_tokens=1) for number in range(4)]
    for one in asked:
        one.args = (*one.args[:2], lambda document: opened.append(len(model.cache_hook.kept)) or document, *one.args[3:])
    model.generate_until(asked)
    assert opened == [0, 0, 2, 2]


def test_the_rank_and_its_gpu_come_from_the_launcher(plugin, monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    model = model_of(plugin)
    assert (model.rank, model.world_size, model.device) == (3, 4, "cpu")
    asked = []
    monkeypatch.setattr(plugin, "pick_device", lambda name, rank=0: asked.append((name, rank)) or "cpu")
    model_of(plugin, device=None)
    model_of(plugin, device="cuda")
    model_of(plugin, device="cuda:0")
    assert asked == [(None, 1), (None, 1), ("cuda:0", 1)]


def test_memory_is_given_back_when_all_answers_are_there(plugin):
    model = model_of(plugin)
    model.clean()
    assert not hasattr(model, "vlm")


def test_a_batch_is_of_one_way_of_decoding_and_of_like_length():
    few, many = Decoding(1), Decoding(2)
    asked = [Asked("a" * length, list, way) for length, way in [(3, few), (9, many), (5, few), (1, many), (4, few)]]
    assert batches(asked, 2) == [[2, 4], [0], [1, 3]]


@pytest.mark.parametrize(
    ("text", "until", "left"),
    [
        ("a\n\nb", ("\n\n",), "a"),
        ("a. b; c", (";", "."), "a"),
        ("abc", ("", "x"), "abc"),
        ("abc", (), "abc"),
        (".b", (".",), ""),
    ],
)
def test_an_answer_ends_at_the_first_of_its_stops(text, until, left):
    assert cut(text, until) == left


def test_damaged_pictures_are_a_named_refusal(plugin):
    whole = (IMAGES / "0.png").read_bytes()
    damaged = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(DataError, match="task task, document 0 cannot be put to this model"):
        model_of(plugin, [[damaged]]).generate_until([lmms_eval_stub.request("Why?", list)])
