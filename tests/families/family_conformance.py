"""The promises of every family, each checked against transformers alone.

Shapes: B samples, S positions, H heads, T text rows, V vision columns, D width, R regions.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, TinyFamily
from conversations import BYTES, ONE, SYSTEM_TURN, Conversation, suiting
from PIL import Image
from plain_transformers import forward, plain_inputs, plain_model

from alignkd.capture.attention import Captured, capture, enable_capture
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.inputs.regions import boxes, tokens_of
from alignkd.losses.recipes import get_recipe
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.objective import Objective
from alignkd.pipeline.evaluate.running.prefix import answer_sharing as answer
from tests.reference.attention import first_attention

LENGTH = 2048
SPOT = 4
ATTENDED = ("out_proj.weight", "o_proj.weight", "projection_layer.weight", "attn.proj.weight")
"""Names in the towers of what carries patches to each other."""


def prepared(vlm: Vlm, conversation: Conversation) -> ModelInput:
    encoder = vlm.encoder(vlm.default_template, LENGTH)
    made, truncated = encoder.encode(conversation.turns, [encoder.load(image) for image in conversation.images])
    assert not truncated
    return made


def batch_of(vlm: Vlm, inputs: list[ModelInput]) -> Batch:
    return vlm.collate(inputs)


def captured_of(vlm: Vlm, conversation: Conversation) -> tuple[Captured, Batch]:
    batch = batch_of(vlm, [prepared(vlm, conversation)])
    with torch.no_grad():
        return capture(vlm, batch), batch


def same_input(ours: ModelInput, theirs: ModelInput) -> bool:
    arrays = [(ours.input_ids, theirs.input_ids), (ours.labels, theirs.labels), (ours.regions_R8, theirs.regions_R8)]
    named = [(ours.token_inputs, theirs.token_inputs), (ours.image_inputs, theirs.image_inputs)]
    if any(set(mine) != set(other) for mine, other in named):
        return False
    arrays += [(ours.spans, theirs.spans), (ours.images.numpy(), theirs.images.numpy())]
    arrays += [(np.asarray(mine[key]), np.asarray(other[key])) for mine, other in named for key in mine]
    return all(np.array_equal(mine, other) for mine, other in arrays)


def answer_runs(made: ModelInput) -> list[list[int]]:
    """Supervised ids, one list for each stretch of them."""
    runs: list[list[int]] = []
    before = IGNORE
    for label in made.labels.tolist():
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


def _overlap(box_V4: np.ndarray, spot: tuple[int, int], size: tuple[int, int], *, reach: float = 0.0) -> np.ndarray:
    """How much of a spot, at (x, y) of an image of ``size``, each box holds; ``reach``: of boxes grown by so much."""
    low_2, high_2 = box_V4[:, :2], box_V4[:, 2:]
    grown_2 = (high_2 - low_2) * reach
    start = np.asarray([spot[1] / size[1], spot[0] / size[0]])
    end = start + np.asarray([SPOT / size[1], SPOT / size[0]])
    shared_2 = np.minimum(high_2 + grown_2, end) - np.maximum(low_2 - grown_2, start)
    return shared_2.clip(0).prod(axis=1)


class FamilyConformance:
    """Subclasses give ``name``, one of :data:`checkpoints.FAMILIES`."""

    @pytest.fixture(scope="class")
    def family(self, name: str) -> TinyFamily:
        return FAMILIES[name]

    @pytest.fixture(scope="class")
    def folder(self, name: str, written: Any) -> Path:
        return written(name)

    @pytest.fixture(scope="class")
    def vlm(self, folder: Path) -> Vlm:
        vlm = load_vlm(folder)
        vlm.model.requires_grad_(False)
        return vlm

    @pytest.fixture(scope="class")
    def local(self, folder: Path) -> Vlm:
        """The model with a tower whose random attention hardly mixes patches, as if it had learnt to look at them."""
        vlm = load_vlm(folder)
        vlm.model.requires_grad_(False)
        for name, parameter in vlm.tower.named_parameters():
            if name.endswith(ATTENDED):
                parameter.mul_(0.05)
        return vlm

    @pytest.fixture(scope="class")
    def plain(self, folder: Path) -> Any:
        return plain_model(folder)

    # Inputs

    def test_ids_and_pixel_values_are_those_of_its_own_processor(self, name, family, folder, vlm):
        for conversation in suiting(family):
            made, theirs = prepared(vlm, conversation), plain_inputs(folder, name, family, conversation)
            ids = theirs["input_ids"][0].tolist()
            # The end token after the last answer is ours, where a template leaves it out at the very end.
            assert batch_of(vlm, [made]).input_ids_BS[0].tolist() == ids, conversation.name
            if conversation.sizes:
                assert torch.equal(made.images, theirs["pixel_values"]), conversation.name
            for key, values in made.token_inputs.items():
                assert values.tolist() == theirs[key][0].tolist(), (conversation.name, key)

    def test_supervised_are_exactly_the_answers_and_the_end_of_their_turns(self, family, vlm):
        for conversation in suiting(family):
            runs = answer_runs(prepared(vlm, conversation))
            decoded = [vlm.tokenizer.decode(run, skip_special_tokens=False).strip() for run in runs]
            assert decoded == [text + family.end for text in conversation.answers], conversation.name

    def test_the_length_is_known_before_the_images(self, family, vlm):
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        for conversation in suiting(family):
            planned = encoder.plan(conversation.turns, len(conversation.sizes), conversation.sizes)
            batch = batch_of(vlm, [prepared(vlm, conversation)])
            assert planned.length == batch.input_ids_BS.shape[1], conversation.name

    def test_a_question_is_the_conversation_up_to_its_last_answer(self, name, family, folder, vlm):
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        for conversation in suiting(family):
            made = encoder.question(conversation.turns, [encoder.load(image) for image in conversation.images])
            theirs = plain_inputs(folder, name, family, conversation, opened=True)
            assert batch_of(vlm, [made]).input_ids_BS[0].tolist() == theirs["input_ids"][0].tolist(), conversation.name
            assert (made.labels == IGNORE).all()

    def test_spans_tell_the_characters_of_the_conversation(self, family, vlm):
        for conversation in suiting(family):
            made = prepared(vlm, conversation)
            words = "".join("".join(text.replace("<image>", "").split()) for _, text in conversation.turns)
            shown = np.zeros(len(words), dtype=bool)
            for start, end in made.spans.tolist():
                assert 0 <= start <= end <= len(words)
                shown[start:end] = True
            assert shown.all(), conversation.name
            last = made.spans[made.labels != IGNORE]
            told = "".join(words[start:end] for start, end in dict.fromkeys(map(tuple, last.tolist())))
            assert told == "".join("".join(text.split()) for text in conversation.answers), conversation.name

    def test_a_system_turn_takes_part_in_the_prompt_or_the_sample_is_refused(self, name, family, folder, vlm):
        encoder, turns = vlm.encoder(vlm.default_template, LENGTH), SYSTEM_TURN.turns
        images = [encoder.load(image) for image in SYSTEM_TURN.images]
        if not family.takes_system:
            for use in (encoder.encode, encoder.question):
                with pytest.raises(PromptError, match="no place for a system turn"):
                    use(turns, images)
            with pytest.raises(PromptError, match="no place for a system turn"):
                encoder.plan(turns, len(images), SYSTEM_TURN.sizes)
            turns = turns[1:]  # what follows is that a system turn without words is none
        made, _ = encoder.encode(turns, images)
        blank, _ = encoder.encode([("system", " \n"), *SYSTEM_TURN.turns[1:]], images)
        without, _ = encoder.encode(SYSTEM_TURN.turns[1:], images)
        assert same_input(blank, without)
        if not family.takes_system:
            return
        theirs = plain_inputs(folder, name, family, SYSTEM_TURN)
        assert batch_of(vlm, [made]).input_ids_BS[0].tolist() == theirs["input_ids"][0].tolist()
        assert made.input_ids.tolist() != without.input_ids.tolist()
        assert answer_runs(made) == answer_runs(without)
        planned = encoder.plan(turns, len(images), SYSTEM_TURN.sizes)
        assert planned.length == theirs["input_ids"].shape[1]
        asked = plain_inputs(folder, name, family, SYSTEM_TURN, opened=True)["input_ids"][0].tolist()
        assert batch_of(vlm, [encoder.question(turns, images)]).input_ids_BS[0].tolist() == asked
        words = "".join("".join(text.replace("<image>", "").split()) for _, text in turns)
        told = "".join(words[start:end] for start, end in dict.fromkeys(map(tuple, made.spans.tolist())))
        assert told == words

    def test_the_encoder_gives_the_same_input_in_another_process(self, family, vlm):
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        moved = pickle.loads(pickle.dumps(encoder))
        for conversation in suiting(family):
            images = [encoder.load(image) for image in conversation.images]
            ours, theirs = (
                e.finish(conversation.turns, e.plan(conversation.turns, len(images), conversation.sizes), images)[0]
                for e in (encoder, moved)
            )
            assert same_input(ours, theirs), conversation.name

    # Regions

    def test_regions_have_as_many_tokens_as_the_sample_has_vision_tokens(self, family, vlm):
        for conversation in suiting(family):
            made = prepared(vlm, conversation)
            batch = batch_of(vlm, [made])
            assert tokens_of(made.regions_R8).sum() == batch.vision_columns_BV.shape[1], conversation.name
            owners, _ = boxes(made.regions_R8)
            assert sorted(set(owners.tolist())) == list(range(len(conversation.sizes))), conversation.name

    def test_boxes_lie_in_the_image_and_cover_what_the_family_sees_of_it(self, family, vlm):
        for conversation in suiting(family):
            for index in range(len(conversation.sizes)):
                owners, box_V4 = boxes(prepared(vlm, conversation).regions_R8)
                sized = box_V4[(owners == index) & (box_V4[:, 2] > box_V4[:, 0])]
                if family.covers == "nothing":
                    assert not len(sized)
                    continue
                least_top, least_left = sized.min(axis=0)[:2]
                most_bottom, most_right = sized.max(axis=0)[2:]
                if family.covers == "middle":
                    assert min(least_top, least_left) >= -1e-6
                    assert max(most_bottom, most_right) <= 1 + 1e-6
                else:
                    assert max(least_top, least_left) <= 0.03
                    assert min(most_bottom, most_right) >= 0.97
                if family.covers == "whole":
                    assert (sized[:, :2] < 1).all()
                    assert (sized[:, 2:] > 0).all()

    @pytest.mark.parametrize("size", [(64, 64), (96, 40), (36, 90)])
    def test_a_changed_spot_changes_most_the_token_whose_box_holds_it(self, family, local, size):
        if family.covers == "nothing":
            pytest.skip("its vision tokens have no place")
        for x, y in ((0.42, 0.55), (0.6, 0.3), (0.1, 0.2), (0.85, 0.12), (0.2, 0.8), (0.8, 0.7)):
            spot = (round(size[0] * x), round(size[1] * y))
            changed_V, made = self._changed(local, size, spot)
            _, box_V4 = boxes(made.regions_R8)
            starts = np.cumsum([0, *tokens_of(made.regions_R8)])
            for start, end in pairwise(starts):
                if (_overlap(box_V4[start:end], spot, size) > 0).any():
                    most = box_V4[start:end][[changed_V[start:end].argmax()]]
                    assert _overlap(most, spot, size, reach=family.reach) > 0, (spot, most)

    @staticmethod
    def _changed(vlm: Vlm, size: tuple[int, int], spot: tuple[int, int]) -> tuple[np.ndarray, ModelInput]:
        """How much each vision token changes with a few pixels, ``[V]``."""
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        turns = [("human", "<image>\na"), ("gpt", "b")]
        rng = np.random.default_rng(0)
        pixels = rng.integers(100, 150, (size[1], size[0], 3)).astype(np.uint8)
        seen = []
        for _ in range(2):
            made, _ = encoder.finish(turns, encoder.plan(turns, 1, [size]), [encoder.load(Image.fromarray(pixels))])
            with torch.no_grad():
                vision = vlm.encode_images(batch_of(vlm, [made]))
            assert vision is not None
            seen.append(vision.tokens_MD)
            pixels[spot[1] : spot[1] + SPOT, spot[0] : spot[0] + SPOT] = [255, 0, 255]
        return (seen[1] - seen[0]).norm(dim=1).numpy(), made

    # One forward pass

    def test_captured_attention_is_the_eager_first_layers(self, name, family, folder, vlm):
        eager = plain_model(folder, "eager")
        for conversation in suiting(family):
            if not conversation.sizes:
                continue
            inputs = plain_inputs(folder, name, family, conversation)
            whole_HSS = forward(eager, inputs, output_attentions=True).attentions[0][0]
            is_image = inputs["input_ids"][0] == vlm.image_token_id
            columns = is_image.nonzero().squeeze(1)
            rows = (~is_image & (torch.arange(len(is_image)) > columns[0])).nonzero().squeeze(1)
            captured, _ = captured_of(vlm, conversation)
            expected_HTV = whole_HSS[:, rows][:, :, columns]
            assert captured.attention[0].shape[1:] == expected_HTV.shape
            torch.testing.assert_close(captured.attention[0][0], expected_HTV, atol=1e-5, rtol=0)
            assert expected_HTV.max() > 1e-4

    def test_logits_are_those_of_the_plain_model_whether_or_not_attention_is_captured(self, name, family, folder, vlm, plain):
        enable_capture(vlm)
        for conversation in suiting(family):
            batch = batch_of(vlm, [prepared(vlm, conversation)])
            with torch.no_grad():
                on, off = (capture(vlm, batch, attention=wanted).hidden_AD for wanted in (True, False))
                assert torch.equal(on, off), conversation.name
                logits_SN = forward(plain, plain_inputs(folder, name, family, conversation)).logits[0]
                torch.testing.assert_close(vlm.head(on), logits_SN[batch.answer_positions_A], atol=1e-5, rtol=0)

    def test_a_sample_alone_is_the_same_in_a_mixed_batch(self, family, vlm):
        conversations = suiting(family)
        with torch.no_grad():
            together = capture(vlm, batch := batch_of(vlm, [prepared(vlm, c) for c in conversations]))
        for i, conversation in enumerate(conversations):
            alone, _ = captured_of(vlm, conversation)
            rows, columns = alone.attention[0].shape[2:]
            close = {"atol": 1e-5, "rtol": 1e-4}
            torch.testing.assert_close(together.attention[0][i, :, :rows, :columns], alone.attention[0][0], **close)
            assert not together.attention[0][i, :, rows:].any()
            assert not together.attention[0][i, :, :, columns:].any()
            torch.testing.assert_close(together.vision_BVD[i, :columns], alone.vision_BVD[0], **close)
            torch.testing.assert_close(together.hidden_AD[batch.answer_samples_A == i], alone.hidden_AD, **close)

    # Training

    def test_attention_sends_gradients_to_queries_keys_and_projector_and_none_to_the_tower(self, family, folder):
        vlm = self._gradients(folder, family)[1]
        attention = {n for n, _ in first_attention(vlm).named_parameters() if any(w in n for w in ("q_proj", "k_proj", "qkv"))}
        moved = {id(p) for p in vlm.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        parameters = dict(first_attention(vlm).named_parameters())
        assert attention
        # A bias of the keys shifts all scores of a row alike, which no probability sees.
        assert all(id(parameters[n]) in moved for n in attention if n.endswith("weight"))
        assert any(id(p) in moved for p in vlm.projector.parameters())
        projector = {id(p) for p in vlm.projector.parameters()}
        frozen = [p for p in vlm.tower.parameters() if id(p) not in projector]
        assert frozen
        assert all(p.grad is None and not p.requires_grad for p in frozen)

    def test_recomputing_activations_gives_the_same_gradients(self, family, folder):
        kept, _ = self._gradients(folder, family)
        again, _ = self._gradients(folder, family, recompute=True)
        assert kept.keys() == again.keys()
        for parameter, gradient in kept.items():
            torch.testing.assert_close(again[parameter], gradient, atol=1e-6, rtol=1e-4)

    @staticmethod
    def _gradients(folder: Path, family: TinyFamily, *, recompute: bool = False) -> tuple[dict[str, torch.Tensor], Vlm]:
        """Of a sum over captured attention alone."""
        vlm = load_vlm(folder)
        objective = Objective(vlm, get_recipe("sft"), None).train()
        if recompute:
            objective.recompute_activations()
        torch.manual_seed(0)  # a Q-Former that is trained drops out
        captured = capture(vlm, batch_of(vlm, [prepared(vlm, c) for c in suiting(family) if c.sizes]))
        weights = torch.rand(captured.attention[0].shape, generator=torch.Generator().manual_seed(0))
        (captured.attention[0] * weights).sum().backward()
        return {n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None}, vlm

    def test_nothing_seen_is_zero_and_reaches_the_projector(self, folder):
        vlm = load_vlm(folder)
        vlm.freeze_tower()
        nothing = vlm.zero_projector_loss()
        assert nothing == 0
        nothing.backward()
        trained = [p for p in vlm.projector.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and not p.grad.any() for p in trained)

    # Out and in again

    def test_what_is_saved_is_what_is_loaded(self, vlm, tmp_path):
        vlm.save(tmp_path / "saved")
        again = load_vlm(tmp_path / "saved")
        assert again.weights_fingerprint() == vlm.weights_fingerprint()
        assert again.tokenizer_fingerprint() == vlm.tokenizer_fingerprint()
        assert again.image_fingerprint() == vlm.image_fingerprint()
        assert same_input(prepared(again, ONE), prepared(vlm, ONE))
        ours, theirs = captured_of(vlm, ONE)[0], captured_of(again, ONE)[0]
        assert torch.equal(ours.hidden_AD, theirs.hidden_AD)
        assert torch.equal(ours.vision_BVD, theirs.vision_BVD)

    def test_two_checkpoints_of_a_family_share_tokens_and_pictures_but_not_weights(self, name, vlm, written):
        other = load_vlm(written(name, 1))
        assert other.weights_fingerprint() != vlm.weights_fingerprint()
        assert other.tokenizer_fingerprint() == vlm.tokenizer_fingerprint()
        assert other.image_fingerprint() == vlm.image_fingerprint()

    def test_generation_in_a_batch_is_transformers_own_of_each_question(self, name, family, folder, vlm, plain, monkeypatch):
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        asked = [c for c in suiting(family) if c.name in ("one", "bytes", "text")]
        questions = [encoder.question(c.turns, [encoder.load(image) for image in c.images]) for c in asked]
        assert len({len(question.input_ids) for question in questions}) > 1
        outputs, generate = [], vlm.model.generate
        monkeypatch.setattr(vlm.model, "generate", lambda **inputs: outputs.append(generate(**inputs)) or outputs[-1])
        answers = answer(vlm, questions, 3)
        for i, conversation in enumerate(asked):
            inputs = plain_inputs(folder, name, family, conversation, opened=True)
            expected = plain.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
            ours = outputs[0][i, -3:].tolist()
            assert ours[: len(expected)] == expected, conversation.name
            assert set(ours[len(expected) :]) <= {vlm.pad_token_id}
            assert answers[i] == vlm.tokenizer.decode(expected, skip_special_tokens=True).strip()

    # Refusals

    def test_text_that_holds_a_special_token_is_refused_by_its_name(self, family, vlm):
        if family.keeps_quirks:
            pytest.skip("its training code reads them as they are")
        end = family.end
        with pytest.raises(ValueError, match="special token"):
            prepared(vlm, Conversation("bad", (("human", f"<image>\nA{end}B"), ("gpt", "b")), ((40, 40),)))

    def test_an_answer_that_holds_an_image_is_refused(self, family, vlm):
        if type(vlm.encoder(vlm.default_template, LENGTH)) is not ChatEncoder:
            pytest.skip("it moves images to the front, whosever turn they are in")
        turns = (("human", "Show me one."), ("gpt", "Here: <image>"))
        with pytest.raises(ValueError, match="image"):
            prepared(vlm, Conversation("bad", turns, ((40, 40),)))

    def test_text_beyond_the_maximum_length_is_cut_and_said(self, family, vlm):
        if family.keeps_quirks:
            pytest.skip("its placeholders count, as in its training code")
        encoder = vlm.encoder(vlm.default_template, LENGTH)
        whole = prepared(vlm, BYTES)
        images = [encoder.load(image) for image in BYTES.images]
        text = int((whole.input_ids != vlm.image_token_id).sum())
        first = int(np.flatnonzero(whole.labels != IGNORE)[0])
        # So short that one answer token is left.
        short = vlm.encoder(vlm.default_template, text - (len(whole.input_ids) - first) + 1)
        made, truncated = short.encode(BYTES.turns, images)
        assert truncated
        assert made.labels.tolist() == whole.labels.tolist()[: first + 1]
