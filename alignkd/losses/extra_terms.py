"""The terms from outside the package that a recipe names, as one module.

Shapes: B samples.
"""

from collections.abc import Callable

import torch
from torch import nn

from alignkd.errors import ConfigError
from alignkd.inputs.batch import Batch, Counts
from alignkd.losses.contract import SampleTerm, TermInputs, TermShapes
from alignkd.losses.dtypes import at_least_float32
from alignkd.losses.recipes import Recipe
from alignkd.losses.term_registry import AveragedOver, RegisteredTerm, find_term


class ExtraTerms(nn.Module):
    """The registered terms that count in a recipe, with their parameters under ``term_NAME``."""

    def __init__(self, recipe: Recipe, shapes: TermShapes) -> None:
        """Construct each term that is a module.

        Raises:
            ConfigError: a class that is not an ``nn.Module``, or a name that is no longer registered.
        """
        super().__init__()
        self.registered = {name: find_term(name) for name in recipe.extra_terms}
        for name, term in self.registered.items():
            self.add_module(f"term_{name}", _module(term, shapes))

    def forward(self, inputs: TermInputs, counts: Counts, *, keep_parameters_in_graph: bool = False) -> dict[str, SampleTerm]:
        """Each term that counts in ``inputs.recipe``, by its name.

        ``keep_parameters_in_graph``: the parameters of a term get a gradient, if only zeros, whatever it computes.

        Raises:
            ConfigError: a term does not return one value per sample.
        """
        found = {}
        for name in inputs.recipe.extra_terms:
            module, over = self.get_submodule(f"term_{name}"), self.registered[name].averaged_over
            value_B = _checked(name, module(inputs), inputs.batch)
            bad_B = ~value_B.detach().isfinite()
            if keep_parameters_in_graph:
                # Under ZeRO-3 the parameters are empty here, and their gradients are not awaited.
                value_B = value_B + sum(p.sum() * 0.0 for p in module.parameters() if p.requires_grad and p.numel())
            value_B = value_B.masked_fill(~_counted(inputs.batch, over), 0.0)
            found[name] = SampleTerm(value_B, getattr(counts, over), bad_B)
        return found


def _counted(batch: Batch, over: AveragedOver) -> torch.Tensor:
    """The samples that a term is averaged over, ``[B]`` of bool."""
    if over == "samples":
        return torch.ones(batch.samples, dtype=torch.bool, device=batch.input_ids_BS.device)
    return batch.samples_with_image() if over == "with_image" else batch.samples_with_text_after_image()


def _checked(name: str, value_B: object, batch: Batch) -> torch.Tensor:
    if not isinstance(value_B, torch.Tensor):
        raise ConfigError(f"loss term {name!r} returned a {type(value_B).__name__}, expected a tensor of one value per sample")
    if value_B.shape != (batch.samples,) or not value_B.is_floating_point():
        raise ConfigError(
            f"loss term {name!r} returned {tuple(value_B.shape)} of {value_B.dtype}, expected one floating-point value per"
            f" sample: ({batch.samples},)"
        )
    return at_least_float32(value_B)


class _FunctionTerm(nn.Module):
    def __init__(self, function: Callable[[TermInputs], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: TermInputs) -> torch.Tensor:
        return self.function(inputs)


def _module(term: RegisteredTerm, shapes: TermShapes) -> nn.Module:
    if not isinstance(term.made_by, type):
        return _FunctionTerm(term.made_by)
    if not issubclass(term.made_by, nn.Module):
        raise ConfigError(f"loss term {term.name!r} is the class {term.made_by.__qualname__}, expected a torch.nn.Module")
    module: nn.Module = term.made_by(shapes)
    return module
