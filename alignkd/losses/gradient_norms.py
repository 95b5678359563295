"""The norm of each term's own gradient."""

from collections.abc import Iterable, Mapping

import torch


def term_gradient_norms(
    losses: Mapping[str, torch.Tensor], parameters: Iterable[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The norm of the gradient of each weighted term over all ``parameters`` that train; float32 scalars on their device.

    ``losses`` are scalars that may share a graph, which is kept until the last of them. No ``.grad`` is touched and no hook of
    DistributedDataParallel fires (run the forward pass through the model itself, not through its wrapper). A parameter that
    a term does not reach counts 0. Each term costs a backward pass and the memory of all gradients. Where processes share a
    step, the norm is that of this process's part; where they share parameters (ZeRO-3), it cannot be computed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert trained, "no parameter trains"
    norms = {}
    for left, (name, loss) in zip(reversed(range(len(losses))), losses.items(), strict=True):
        found: list[torch.Tensor] = []
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, trained, retain_graph=left > 0, allow_unused=True)
            found = [gradient for gradient in gradients if gradient is not None]
        norms[name] = _norm(found) if found else torch.zeros((), device=trained[0].device)
    return norms


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """In float32: a norm in float16 overflows, and one in bfloat16 is coarse."""
    each = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(each))
    return norm
