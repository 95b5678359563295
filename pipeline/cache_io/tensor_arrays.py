"""Tensors as the arrays that a cache keeps once, and back: the bits of bfloat16, which numpy does not know, as uint16."""

import warnings

import numpy as np
import torch


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A host tensor as an array that shares its memory."""
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """An array of a cache as a tensor that shares its memory, which is read-only: nothing may write into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
