"""Inception Score (Salimans et al. 2016, section 4): each image clearly one class, all classes there.

    IS = exp( E_x KL( p(y|x) ‖ p(y) ) ),    p(y) = E_x p(y|x)

from 1 to the number of classes. It looks at generated images only, and says little where the
classifier's classes (here ImageNet's) are not what the images show.
"""

from __future__ import annotations

import torch

from pipeline.metrics.checks import Array, checked


def inception_score(logits: Array, splits: int, generator: torch.Generator | None) -> tuple[float, float]:
    """Mean and deviation of the score over `splits` parts of `logits` `[n, classes]`; random parts with a generator.

    Raises:
        UserError: fewer samples than splits, NaN.
    """
    values = checked(logits, "logits", at_least=splits, reason="one per split")
    order = torch.arange(len(values)) if generator is None else torch.randperm(len(values), generator=generator)
    scores = []
    for part in order.chunk(splits):
        log_p = values[part].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - torch.tensor(len(part), dtype=log_p.dtype).log()
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    result = torch.stack(scores)
    return result.mean().item(), result.std(unbiased=False).item()
