"""Tensors to the arrays that a cache keeps once, and back. numpy has no bfloat16: its bits are kept as uint16."""

import warnings

import numpy as np
import torch


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """An array that shares the memory of a tensor on the host."""
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the memory of a cache's array, which is read-only: nothing may write into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
