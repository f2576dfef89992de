"""Metrics of merit for images: how far apart two sets of images are, and how close two images.

    config.py            section `evaluate`
    images.py          a folder, a tar or a folder of tars, as images by name
    features.py          extractors by name: images -> features and class logits
    efficientnet_lite.py inception_v3.py networks.py       their networks; CLIP also judges captions
    feature_store.py     features on disk by content hash; feature files
    reference.py         mean and covariance of reference sets, likewise
    frechet.py  kid.py  inception_score.py  manifold.py    metrics of sets, from features or logits
    reconstruction.py  lpips.py                            PSNR, SSIM and LPIPS, metrics of pairs
    compare.py           all of them over two sets, as the rows of metrics.json
    evaluation.py sweep.py                                 the stage evaluate: a run's metrics; settings of sampling
    command.py           `smalti evaluate`

Every function that takes features wants `[samples, dimensions]`, any float type; it computes in
float64 and raises UserError on what cannot be measured (NaN, too few samples, other dimensions).
Smaller is better for Fréchet distance and KID, larger for everything else.
"""
