"""Random weights that behave like trained ones, for want of a checkpoint.

Freshly initialised models hide errors: CaiT's LayerScale of 1e-5 and its head mixers near zero keep a wrong attention
out of the logits, a BatchNorm that has seen no image is the identity, and ViT's head starts at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomize_like_trained(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Change ``model`` in place so that every residual branch reaches the logits, and return it.

    LayerScale becomes 0.1 to 0.5, head mixers the identity plus noise, a head of zeros noise; the weights and biases of
    BatchNorm vary around 1 and 0, and its running statistics are those of ``images`` (B, 3, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            if name.endswith((".gamma_1", ".gamma_2")):
                parameter.copy_(0.1 + 0.4 * noise)
            elif ".proj_l." in name or ".proj_w." in name or ".reatten_matrix." in name:
                mixer = torch.eye(parameter.shape[0]).reshape(parameter.shape) if parameter.dim() > 1 else 0.0
                parameter.copy_(mixer + 0.2 * (noise - 0.5))
            elif name == "head.weight" and not parameter.any():
                parameter.copy_(0.1 * (noise - 0.5))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2, generator=generator)
            norm.bias.uniform_(-0.1, 0.1, generator=generator)
            norm.momentum = None  # one pass then gives the statistics of these images
        was_training = model.training
        model.train()
        model(images)
        model.train(was_training)
        for norm in norms:
            norm.momentum = 0.1
    return model
