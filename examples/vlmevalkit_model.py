"""A checkpoint of any family as a model of VLMEvalKit, which finds models in a dictionary alone: it gets one more key there.

From the folder of VLMEvalKit, whose run.py does the rest:

    python .../examples/vlmevalkit_model.py run/student --data POPE --model alignkd
"""

import functools
import runpy
import sys

import torch
from PIL import Image
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from alignkd import load_vlm
from alignkd.pipeline.evaluate.decoding import Decoding
from alignkd.pipeline.evaluate.harness.answering import Asked, answers, harness_encoder


class AlignkdModel(BaseModel):
    """Answers one message at a time, greedily; pictures stand where the message has them."""

    INTERLEAVE = True

    def __init__(self, folder: str, max_new_tokens: int = 512) -> None:
        super().__init__()
        on_gpu = torch.cuda.is_available()
        self.vlm = load_vlm(folder, dtype=torch.float16 if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")
        self.encoder, self.decoding = harness_encoder(self.vlm, None, None), Decoding(max_new_tokens)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a list of ``{"type": "image" or "text", "value"}``."""
        files = [part["value"] for part in message if part["type"] == "image"]
        text = "\n".join("<image>" if part["type"] == "image" else part["value"] for part in message)
        asked = Asked(text, lambda: [Image.open(file) for file in files], self.decoding, name=f"a question of {dataset}")
        ((_, answer),) = answers(self.vlm, self.encoder, [asked], batch_size=1)
        return answer


if __name__ == "__main__":
    supported_VLM["alignkd"] = functools.partial(AlignkdModel, sys.argv.pop(1))
    sys.path.insert(0, ".")
    runpy.run_path("run.py", run_name="__main__")
