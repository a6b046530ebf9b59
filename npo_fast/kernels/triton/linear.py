"""The linear operators of a GPU: tile kernels in half precision, vendor GEMMs in fp32.

fp32 operands multiply without tensor cores, which the tile kernels are made for.
"""

import torch
from torch import Tensor

from npo_fast.kernels.triton import linear_backward as tiles_backward
from npo_fast.kernels.triton import linear_forward as tiles_forward
from npo_fast.kernels.triton.linear_sliced import sliced_backward, sliced_forward


def linear_forward(hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    serve = sliced_forward if hidden.dtype == torch.float32 else tiles_forward.linear_forward
    return serve(hidden, *rest)


def linear_backward(g: Tensor, hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    serve = sliced_backward if hidden.dtype == torch.float32 else tiles_backward.linear_backward
    return serve(g, hidden, *rest)
