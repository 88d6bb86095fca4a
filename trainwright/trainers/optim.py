"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) over named weights."""

import torch
from torch import Tensor

from trainwright.configs.schema import OptimConfig


def build_adamw(weights: dict[str, Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW, its moments in place from the start so that a checkpoint can load into them.

    weights: this rank's parts, by name; a part may be empty.

    With `optim.decay=matrices` weight decay spares the vectors (norm gains), as most Llama recipes do.
    """
    decayed = [w for w in weights.values() if optim.decay == "all" or w.dim() > 1]
    spared = [w for w in weights.values() if optim.decay != "all" and w.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    for weight in weights.values():
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer
