"""Image-quality metrics as pure functions, one metric a module: tensors in, numbers out, nothing read or written.

    of two sets, from features      frechet.py (FID, sFID, FD, FD∞)   kid.py   cmmd.py   authenticity.py
                                    precision_recall.py (and density, coverage)
    of one set, from class logits   inception_score.py
    of images and their captions    clip_score.py (and retrieval R@k)
    of pairs of images              psnr_ssim.py   lpips.py
    what they share                 neighbours.py (nearest neighbours in blocks)   checks.py (of the input)

Features come from `pipeline/extractors`; `pipeline/evaluation/set_metrics.py` lists the metrics that are measured.
Functions of features take `[samples, dimensions]` of any float type, compute in float64, and raise UserError on what
cannot be measured: NaN, too few samples, unequal dimensions. Lower is better for the Fréchet distance, KID and LPIPS,
higher for all others.
"""
