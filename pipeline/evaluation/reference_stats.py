"""Statistics of reference sets on disk: mean and root of the covariance of a set that is compared with often.

    <folder>/statistics/<hash>.npz        under the hash of the features themselves, whatever file they came from

Hashing 50,000 x 2,048 features takes a second, their covariance and its root ten. A set of fewer samples than
dimensions has no covariance worth keeping: its samples say the same in less (`frechet.Gaussian`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core.atomic_io import atomic_path
from pipeline.metrics.checks import BLOCK, checked
from pipeline.metrics.frechet import Gaussian

_FORMAT = "smalti statistics 1"


def reference_gaussian(features: Tensor, folder: Path | None) -> Gaussian:
    """The Gaussian of `features` `[n, d]`, from `folder` if it is there, and kept there if not. Same bits either way.

    Raises:
        UserError: fewer than 2 samples, NaN.
    """
    checked(features, "real", at_least=2, reason="a covariance")
    if folder is None or len(features) <= features.shape[1]:
        return Gaussian.of(features)
    path = folder / "statistics" / f"{_hash(features)}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            mean, root, trace = (torch.from_numpy(kept[name]).to(features.device) for name in ("mean", "root", "trace"))
        os.utime(path)  # for `feature_store.trim`
        return Gaussian(mean, root, trace)
    except Exception:  # not there, or damaged, which numpy tells in some ten ways: it is made anew
        pass
    made = Gaussian.of(features)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mean=made.mean.cpu().numpy(), root=made.root.cpu().numpy(), trace=made.trace.cpu().numpy())
    return made


def _hash(features: Tensor) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\n{features.dtype}\n{tuple(features.shape)}".encode())
    for block in features.split(BLOCK):
        digest.update(block.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
