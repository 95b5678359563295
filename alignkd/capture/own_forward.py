"""What is captured of a model is the model's own: both are compared once, before anything is made of them.

On one prompt, with a noisy image and text after it:

1. The logits of the model's own forward pass, as it is without us, against the output head over the captured hidden states.
   Some models multiply or divide logits by a number of their configuration: the one that fits is found here.
2. The captured attention of the first layer against that of the model's slow kernel ("eager"); in float32 also that of the
   first layer of each other kind, whose states have gone through more roundings.

The prompt is that of :mod:`alignkd.capture.check_prompt`; the differences that are allowed are those of rounding in the dtype.

Shapes: A answers, D width, N vocabulary, H heads, T text rows, V vision columns, S positions.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignkd.capture.check_prompt import ANSWERS, length_beyond_reach, lengthened, noise_prompt
from alignkd.capture.kernel import Tap
from alignkd.capture.probabilities import of_whole
from alignkd.errors import CheckpointError, wrap_errors
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm

_LOGITS = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest root mean square of a difference, in those of the logits: some roundings of the dtype."""
_PROBABILITY = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference of probabilities that is always rounding; four times what rounding of queries and keys makes is, too."""
_AFTER_HEAD = re.compile(r"logit|softcap|multiplier|unpadded|head_scal")

Run = Callable[[Batch, Tap], torch.Tensor]
"""Last hidden states at a batch's answers, ``[A, D]``; the tap records the attention of its layers."""


@torch.no_grad()
def check_own_forward(vlm: Vlm, run: Run) -> float:
    """Compare, and return the number that the model multiplies its head's logits by (1 for most).

    Raises:
        CheckpointError: logits or attention differ by more than rounding, and how much.
    """
    prompt = noise_prompt(vlm)
    length = length_beyond_reach(vlm, len(vlm.collate([prompt]).input_ids_BS[0]))
    with _as_for_inference(vlm):
        while True:
            batch = vlm.collate([lengthened(vlm, prompt, length)]).to(vlm.device)
            try:
                return _compare(vlm, run, batch)
            except torch.OutOfMemoryError:
                if length <= 2 * ANSWERS:
                    raise
                length //= 2


def _compare(vlm: Vlm, run: Run, batch: Batch) -> float:
    own_AN = _own_logits(vlm, batch)
    layers = _kinds_of_layers(vlm)
    tap = Tap(batch, frozenset(layers), exact={})
    with _told(f"{vlm.folder}: its forward pass in parts fails"):
        hidden_AD = run(batch, tap)
    scale = _logit_scale(vlm, own_AN, hidden_AD)
    if tap.layers - tap.found.keys() >= {0}:
        raise CheckpointError(
            f"{vlm.folder}: no attention of layer 0 can be captured: its attention is no softmax, or its layers do not hand"
            " their keywords on to it"
        )
    if vlm.decoder.config._attn_implementation != "eager":  # which is captured from that kernel itself
        for layer in sorted(tap.found.keys() & set(layers)):
            assert tap.exact is not None
            _compare_attention(vlm, layer, tap.found[layer], tap.exact[layer], _eager(vlm, batch, layer))
    return scale


def _own_logits(vlm: Vlm, batch: Batch) -> torch.Tensor:
    """Those that predict the answers, ``[A, N]``, from a forward pass that nothing of ours takes part in."""
    last = batch.input_ids_BS.shape[1]
    given = _own_inputs(vlm, batch)
    if "logits_to_keep" in _parameters(vlm.model.forward):
        given["logits_to_keep"] = ANSWERS + 1
    with _told(f"{vlm.folder}: its own forward pass fails"):
        output = vlm.model(**given)
    logits_SN: torch.Tensor = getattr(output, "language_model_outputs", output).logits[0]
    return logits_SN[batch.answer_positions_A - (last - len(logits_SN))]


def _own_inputs(vlm: Vlm, batch: Batch) -> dict[str, Any]:
    extra = {name: value for name, value in vlm.generation_inputs(batch).items() if isinstance(value, torch.Tensor)}
    return {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS.long(), "use_cache": False, **extra}


def _logit_scale(vlm: Vlm, own_AN: torch.Tensor, hidden_AD: torch.Tensor) -> float:
    """1, or a number of the configuration or its inverse, whichever makes the head's logits the model's own.

    Raises:
        CheckpointError: none does.
    """
    found_AN, own_AN = vlm.head(hidden_AD).float(), own_AN.float()
    settings = _numbers_after_head(vlm)
    about = f" Its configuration has {', '.join(f'{k} = {v}' for k, v in settings.items())}." if settings else ""
    advice = " The losses and caches compute logits from hidden states and the output head: use another model"
    if found_AN.shape != own_AN.shape:
        raise CheckpointError(
            f"{vlm.folder}: its forward pass gives {own_AN.shape[1]} logits a position, its output head {found_AN.shape[1]}."
            + about
            + advice
        )
    scales = [1.0, *(s for v in settings.values() if v for s in (v, 1 / v))]
    finite_AN = own_AN.isfinite()
    if not torch.equal(finite_AN, found_AN.isfinite()):
        raise CheckpointError(f"{vlm.folder}: its logits overflow in other places when they are computed from hidden states")
    own, found = own_AN[finite_AN].double(), found_AN[finite_AN].double()
    off = {scale: float((own - scale * found).square().mean().sqrt()) for scale in scales} if len(own) else {1.0: 0.0}
    scale = min(off, key=off.__getitem__)
    size = float(own.square().mean().sqrt()) if len(own) else 1.0
    if off[scale] > _tolerance(vlm, _LOGITS) * max(size, 1e-6):
        raise CheckpointError(
            f"{vlm.folder}: the logits of its own forward pass are not those of its output head over its last hidden states:"
            f" off by {float((own - found).abs().max()):.2g}, where logits are about {size:.2g}." + about + advice
        )
    if off[1.0] <= _tolerance(vlm, _LOGITS) * max(size, 1e-6):
        return 1.0
    if vlm.head.bias is not None:
        raise CheckpointError(f"{vlm.folder}: its logits are scaled after an output head with a bias.{about}{advice}")
    return scale


def _numbers_after_head(vlm: Vlm) -> dict[str, float]:
    """Numbers of the configuration that may act on logits, by name."""
    found = {}
    for config in (vlm.model.config, vlm.text_config):
        for name, value in config.to_dict().items():
            if _AFTER_HEAD.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)
    return found


def _kinds_of_layers(vlm: Vlm) -> list[int]:
    """The first layer, and the first of each other kind where states are exact enough to compare them."""
    kinds = getattr(vlm.text_config, "layer_types", None)
    if not isinstance(kinds, list | tuple) or _least(vlm) != torch.float32:
        return [0]
    return sorted({0, *(list(kinds).index(kind) for kind in set(kinds))})


@contextmanager
def _told(message: str) -> Iterator[None]:
    """Errors of the model's code as one message; a device's memory that runs out is no fault of the model."""
    try:
        with wrap_errors(CheckpointError, message, Exception):
            yield
    except CheckpointError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError | _StopError):
            raise error.__cause__ from None
        raise


class _StopError(Exception):
    """Ends a forward pass after the layer that was asked for."""


def _eager(vlm: Vlm, batch: Batch, layer: int) -> torch.Tensor | None:
    """Attention of the model's own slow kernel, ``[1, H, T, V]``; None where it has none."""
    found: list[torch.Tensor] = []

    def take(module: nn.Module, given: Any, output: Any) -> None:
        del module, given
        whole_BHSS = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(whole_BHSS, torch.Tensor) and whole_BHSS.shape[2:] == (batch.input_ids_BS.shape[1],) * 2:
            found.append(of_whole(whole_BHSS, batch))
        raise _StopError

    hook = vlm.decoder.layers[layer].self_attn.register_forward_hook(take)
    try:
        with _eager_kernel(vlm), _told(f"{vlm.folder}: its slow attention kernel fails"):
            vlm.model(**_own_inputs(vlm, batch))
    except _StopError:
        pass
    finally:
        hook.remove()
    return found[0] if found else None


def _compare_attention(vlm: Vlm, layer: int, found: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor | None) -> None:
    if eager is None:
        raise CheckpointError(
            f"{vlm.folder}: the captured attention of layer {layer} cannot be checked: the model gives none by its slow kernel"
        )
    off, spread = float("inf"), 0.0
    # Half precision may overflow in a pass over noise, but in both kernels alike.
    if found.shape == eager.shape and torch.equal(finite := found.isfinite(), eager.isfinite()):
        spread, off = _most(found - exact, finite & exact.isfinite()), _most(found - eager, finite)
    if not off <= max(_tolerance(vlm, _PROBABILITY), 4 * spread):
        raise CheckpointError(
            f"{vlm.folder}: the attention captured in layer {layer} is not the model's own: probabilities are off by {off:.2g}"
            " from its slow kernel's. It has attention that alignkd does not know: use another model"
        )


def _most(difference: torch.Tensor, where: torch.Tensor) -> float:
    return float(difference[where].abs().max()) if where.any() else 0.0


def _tolerance(vlm: Vlm, by_dtype: Mapping[torch.dtype, float]) -> float:
    least = _least(vlm)
    reduced = least == torch.float32 and vlm.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return by_dtype[torch.float16 if reduced else least]


def _least(vlm: Vlm) -> torch.dtype:
    """The dtype that rounds most."""
    return vlm.dtype if vlm.dtype in _LOGITS else torch.float32


@contextmanager
def _as_for_inference(vlm: Vlm) -> Iterator[None]:
    """No dropout, no autocast; as before afterwards."""
    training = [module for module in vlm.model.modules() if module.training]
    vlm.model.eval()
    try:
        with torch.autocast(vlm.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager_kernel(vlm: Vlm) -> Iterator[None]:
    layers = [layer.self_attn for layer in vlm.decoder.layers if hasattr(layer, "self_attn")]
    configs = {id(part.config): part.config for part in (vlm.decoder, *layers) if hasattr(part, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _parameters(function: Any) -> Mapping[str, Any]:
    return inspect.signature(function).parameters
