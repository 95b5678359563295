"""InstructBLIP: queries that read the image for a question, before the prompt.

The queries' outputs are the vision tokens. They depend on the question, so the Q-Former is given the first question and nothing
after it: an answer would leak into the vision tokens, and a later question was not asked yet.

Shapes: N images, Q queries, W word pieces of the longest question, L ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from alignkd.errors import CheckpointError
from alignkd.inputs.batch import Batch, ModelInput
from alignkd.inputs.prompts import PromptError, Turns, check_template
from alignkd.models.encoders.rgb import check_prepared, rgb_by_processor
from alignkd.models.encoders.segments import Segment, SegmentEncoder, own_answer, own_text
from alignkd.models.modules.embedding import run_decoder
from alignkd.models.transformers_vlm import TransformersVlm
from alignkd.models.vlm import Vision


@dataclass
class InstructBlipEncoder(SegmentEncoder):
    """The queries of all images, the start token, the question unchanged, the answer, the end token.

    The model was tuned with this prompt, on one image, one question and one answer, without words of a template; further turns
    follow in the same way. Source: InstructBLIP (arXiv 2305.06500), and the inputs that its released processor makes.
    """

    image_processor: Any = None
    qformer_tokenizer: Any = field(default=None, repr=False)
    longest_question: int = 512

    @property
    def image(self) -> Segment:
        """An id for each query."""
        return Segment(ids=(self.image_token_id,) * self.vision_tokens)

    def decode(self, image: Image.Image) -> Image.Image:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        check_prepared(image.size, self.image_processor)
        return rgb_by_processor(image, self.image_processor)

    def load(self, image: Image.Image) -> torch.Tensor:
        """Its pixel values."""
        return torch.from_numpy(np.asarray(self.image_processor([self.decode(image)])["pixel_values"][0]))

    def segments(self, turns: Turns, images: int) -> list[Segment]:
        """See :class:`SegmentEncoder`."""
        made = [self.image] * images + [Segment(ids=self.start)]
        for speaker, text in turns:
            answer = speaker == "gpt"
            made.append(Segment((((own_answer if answer else own_text)(text), True),), supervised=answer))
            if answer:
                made.append(Segment(ids=(int(self.tokenizer.eos_token_id),), supervised=True))
        return made

    def image_inputs(self, turns: Turns, images: int) -> Mapping[str, torch.Tensor]:
        """The first question as the Q-Former's token ids, once for each image, ``[N, W]``."""
        ids = self.qformer_tokenizer(own_text(turns[0][1])).input_ids
        if len(ids) > self.longest_question:
            raise PromptError(f"its question has {len(ids)} word pieces, the Q-Former reads {self.longest_question} at most")
        ids_NW = torch.tensor([ids] * images)
        return {"qformer_input_ids": ids_NW, "qformer_attention_mask": torch.ones_like(ids_NW)}


@dataclass
class InstructBlip(TransformersVlm):
    """``InstructBlipForConditionalGeneration`` over a decoder (Vicuna).

    Only the vision model is frozen, as in its instruction tuning, which trains the Q-Former and its queries: they are what
    follows an instruction. They use the student's learning rate, ``language_projection`` that of the projector.
    """

    tower_path: ClassVar[str] = "vision_model"
    projector_path: ClassVar[str] = "language_projection"

    @property
    def templates(self) -> tuple[str, ...]:
        """Question and answer, without words of a template."""
        return ("instruction",)

    @property
    def vision_tokens_per_image(self) -> int:
        """The Q-Former's queries."""
        return int(self.model.config.num_query_tokens)

    def check(self) -> None:
        """See :class:`TransformersVlm`."""
        config = self.model.config
        if not config.use_decoder_only_language_model:
            raise CheckpointError(
                f"{self.folder}: this InstructBLIP has the encoder-decoder {config.text_config.model_type!r} (Flan-T5), whose"
                " answers read the image by cross-attention: no vision tokens stand among them. Use a Vicuna checkpoint"
            )
        written = self.processor.num_query_tokens
        if config.image_token_index is None or written != config.num_query_tokens:
            raise CheckpointError(
                f"{self.folder}: its model has {config.num_query_tokens} queries and image token {config.image_token_index},"
                f" its processor writes {written} (num_query_tokens): use the checkpoint's newer files, or set both alike"
            )
        self._check_prompts()

    def encoder(self, template: str, max_length: int) -> InstructBlipEncoder:  # type: ignore[override]
        """See :class:`alignkd.models.vlm.Vlm`."""
        check_template(template, self.templates)
        return InstructBlipEncoder(
            self.tokenizer,
            None,
            template,
            max_length,
            self.image_token_id,
            self.vision_tokens_per_image,
            self.processor.image_processor,
            self.processor.qformer_tokenizer,
            int(self.model.config.qformer_config.max_position_embeddings),
        )

    def encode_images(self, batch: Batch) -> Vision | None:
        """Run tower and Q-Former over each image with its sample's question."""
        if not batch.images.numel():
            return None
        found = self.model.get_image_features(self._pixels(batch), **batch.image_inputs, return_dict=True)
        return Vision(found.pooler_output.flatten(0, 1))

    def decode(self, batch: Batch, vision: Vision | None, **kwargs: Any) -> torch.Tensor:
        """See :class:`alignkd.models.vlm.Vlm`."""
        return run_decoder(self.model.get_input_embeddings(), self.decoder, batch, vision, **kwargs)

    def generation_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """Its generation needs an image even where no sample has one; nothing then reads its vision tokens."""
        shown = batch if batch.images.numel() else self.collate([self._grey]).to(self.device)
        return {"pixel_values": self._pixels(shown), **shown.image_inputs}

    @cached_property
    def _grey(self) -> ModelInput:
        encoder = self.encoder(self.default_template, 2**20)
        image = encoder.load(Image.new("RGB", (64, 64), (128, 128, 128)))
        return encoder.question([("human", "<image>\na"), ("gpt", "b")], [image])
