"""Images unlike those of any task, made from a batch: mixed from two of its images, or distorted as well."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.ranks.collectives import gathered, rank, world


def mixed(x: Tensor, alpha: float) -> Tensor:
    """λ_b·x_b + (1 − λ_b)·x_π(b), with λ_b ~ Beta(α, α) and a random cycle π through the batch.

    x: [B, 3, H, W], of this rank; the images are mixed within the batch of all ranks. Zhang et al., 2018 (mixup,
    arXiv 1710.09412).
    """
    whole = _of_all_ranks(x)
    share = torch.distributions.Beta(alpha, alpha).sample((len(whole), 1, 1, 1)).to(x)
    order = torch.randperm(len(whole))
    partners = torch.empty_like(order).scatter_(0, order, order.roll(1))  # no image is its own
    return _own(torch.lerp(whole[partners.to(x.device)], whole, share), x)


def distorted(x: Tensor) -> Tensor:
    """Each image turned, cropped, perhaps mirrored, its colours permuted and perhaps inverted, at random.

    x: [B, 3, H, W], of this rank; the draws are those of the batch of all ranks. A crop has 0.3 to 1 times the sides of the
    image; what lies outside the image is mirrored.
    """
    whole = _of_all_ranks(x)
    b = len(whole)
    angle, side = (torch.rand(b) * 2 - 1) * math.pi, 0.3 + 0.7 * torch.rand(b)
    mirror, invert = torch.randint(2, (2, b)) * 2.0 - 1
    centre = (torch.rand(b, 2) * 2 - 1) * (1 - side)[:, None]
    channels = torch.rand(b, 3).argsort(1)
    cos, sin = side * angle.cos(), side * angle.sin()
    rows = (torch.stack([mirror * cos, -sin, centre[:, 0]], 1), torch.stack([mirror * sin, cos, centre[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(whole.shape), align_corners=False)
    moved = F.grid_sample(whole, grid.to(x), padding_mode="reflection", align_corners=False)
    colours = channels.to(x.device)[:, :, None, None].expand_as(moved)
    return _own(moved.gather(1, colours) * invert.to(x)[:, None, None, None], x)


def _of_all_ranks(x: Tensor) -> Tensor:
    """The images of all ranks in the order of the whole batch, every world-th of them being this rank's."""
    images = gathered(x)
    order = torch.cat([torch.arange(r, len(images), world()) for r in range(world())]).argsort()
    return images if world() == 1 else images[order.to(x.device)]


def _own(whole: Tensor, x: Tensor) -> Tensor:
    """This rank's rows of the whole batch, as many as it has in x."""
    return whole if len(whole) == len(x) else whole[rank() :: world()]
