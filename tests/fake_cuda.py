"""CUDA tensors without a GPU: see pipeline/core/fake_cuda.py, which `smalti plan` counts on, too."""

from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda

__all__ = ["fake_cuda", "to_fake_cuda"]
