"""Figures of merit for pictures: how far apart two sets of pictures are, and how close two pictures.

    config.py            section `evaluate`
    pictures.py          a folder, a tar or a folder of tars, as pictures by name
    features.py          extractors by name: pictures -> features and class logits
    efficientnet_lite.py inception_v3.py networks.py       their networks; CLIP also judges captions
    feature_store.py     features on disk by content hash; feature files
    reference.py         mean and covariance of reference sets, likewise
    frechet.py  kid.py  inception_score.py  manifold.py    figures of sets, from features or logits
    reconstruction.py  lpips.py                            PSNR, SSIM and LPIPS, figures of pairs
    compare.py           all of them over two sets, as the rows of metrics.json
    evaluation.py sweep.py                                 the stage evaluate: a run's figures; settings of sampling
    command.py           `smalti evaluate`

Every function that takes features wants `[samples, dimensions]`, any float type; it computes in
float64 and raises UserError on what cannot be measured (NaN, too few samples, other dimensions).
Smaller is better for Fréchet distance and KID, larger for everything else.
"""
