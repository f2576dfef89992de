"""Makes golden.json: what torch-fidelity 0.4.0 and lpips 0.1.4 say of seeded inputs. Run once, kept for the record.

    python -m venv golden-venv && golden-venv/bin/pip install torch torch-fidelity==0.4.0 lpips==0.1.4
    PYTHONPATH=. golden-venv/bin/python -m tests.metrics.golden.make

Both need torchvision, which is why the project does not depend on them. torchvision's wheel for CUDA does not import
beside a CPU build of torch; none of its compiled operators is needed here, so they are declared (`_declare_operators`).
torch-fidelity takes the generated set first.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.metrics import seeded

KID = {"kid_subsets": 1, "kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
KID |= {"kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}


def main() -> None:
    _declare_operators()
    import torch_fidelity
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    values: dict[str, object] = {"torch-fidelity": torch_fidelity.__version__, "torch": torch.__version__}
    for name, (real, generated) in seeded.CASES.items():
        x, y = torch.from_numpy(real), torch.from_numpy(generated)
        n = min(len(x), len(y))
        fid = fid_statistics_to_metric(fid_features_to_statistics(y), fid_features_to_statistics(x), False)
        kid = kid_features_to_metric(y[:n], x[:n], kid_subset_size=n, **KID)
        prc = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False)
        values[name] = {key: float(value) for key, value in {**fid, **kid, **prc}.items()}
    logits = torch.from_numpy(seeded.logits(5000, 1008))
    score, deviation = isc_features_to_metric(logits, splits=10, shuffle=False).values()
    values["inception score"] = {"mean": float(score), "deviation": float(deviation)}
    values["inception network"] = _inception()
    values["lpips"] = _lpips()
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(values, indent=2) + "\n")


def _inception() -> dict[str, list[float]]:
    """Features and logits of 299 × 299 images (no resizing) under seeded weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    from pipeline.extractors.inception_v3 import InceptionV3

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(seeded.weights(InceptionV3().state_dict()), path)
        names = ["2048", "logits_unbiased"]
        network = module.FeatureExtractorInceptionV3("it", names, feature_extractor_weights_path=str(path))
        features, logits = network(seeded.images(2, 299, seed=3))
    return {"features": features[:, ::64].flatten().tolist(), "logits": logits[:, ::64].flatten().tolist()}


def _lpips() -> list[float]:
    import lpips

    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = network.net.state_dict()
    # slice1.0.weight -> features.0.weight, the name that the seeded values are made from
    made = seeded.weights({re.sub(r"slice\d+", "features", name): tensor for name, tensor in state.items()})
    network.net.load_state_dict({name: made[re.sub(r"slice\d+", "features", name)] for name in state})
    x, y = (seeded.images(3, 64, seed).float() / 255 for seed in (3, 4))
    with torch.inference_mode():
        distances = network(x, y, normalize=True)
    return [float(value) for value in distances.flatten()]


def _declare_operators() -> None:
    """Let torchvision import although its compiled operators cannot be loaded."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # declared as long as it lives
    for _ in range(50):
        try:
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}() -> ()")
        else:
            return


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
