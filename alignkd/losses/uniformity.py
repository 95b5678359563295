"""Whether a teacher's attention is informative: uniform attention over the image teaches nothing.

Shapes: B samples, H heads, T text rows, V vision columns.
"""

import torch


@torch.no_grad()
def attention_contrast(attention_BHTV: torch.Tensor, text_mask_BT: torch.Tensor, vision_mask_BV: torch.Tensor) -> torch.Tensor:
    """How much attention differs over vision columns: the squared coefficient of variation of each row.

    Averaged over the heads and text rows of a sample, then over samples with an image and text after it; a float32 scalar
    on the attention's device. 0: uniform, or no attention to the image at all; V - 1: all on one column; NaN: there is no
    sample with text after an image. The columns of an image that comes after a row count as zeros.
    """
    columns_B = vision_mask_BV.sum(dim=1)
    rows_B = text_mask_BT.sum(dim=1) * (columns_B > 0)
    masked_BHTV = attention_BHTV * vision_mask_BV[:, None, None, :]
    # Sums in float32, without a float32 copy of the attention.
    total_BHT = masked_BHTV.sum(dim=3, dtype=torch.float32)
    norm_BHT = torch.linalg.vector_norm(masked_BHTV, dim=3, dtype=torch.float32)
    relative_BHT = norm_BHT / total_BHT.clamp(min=torch.finfo(torch.float32).tiny)
    contrast_BHT = (columns_B[:, None, None] * relative_BHT.square() - 1).clamp(min=0)
    contrast_B = (contrast_BHT.mean(dim=1) * text_mask_BT).sum(dim=1) / rows_B.clamp(min=1)
    contrast: torch.Tensor = (contrast_B * (rows_B > 0)).sum() / (rows_B > 0).sum()
    return contrast
