"""Features of unit norm, whose products are cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(features: Tensor) -> Tensor:
    """Features [..., d] of norm 1, in single precision at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
