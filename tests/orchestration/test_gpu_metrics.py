"""The GPU's load, memory, power and temperature are among the metrics. NVML, which needs a GPU, is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from pipeline.orchestration import gpu_metrics
from pipeline.orchestration.tracking import Tracker


@pytest.fixture
def _nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """One card, `GPU-1`, and one MIG instance of it, of which NVML knows nothing but the memory."""

    def only_of_cards(value: object) -> object:
        def read(handle: str, *_: int) -> object:
            if handle.startswith("MIG-"):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value

        return read

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", only_of_cards(SimpleNamespace(gpu=97)))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=60 << 30))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", only_of_cards(412_500))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", only_of_cards(63))
    gpu_metrics._handle.cache_clear()


def _logged(folder: Path) -> dict[str, float]:
    Tracker(folder, None).log({"loss": 1.0}, 1)
    line: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text())
    return {name: value for name, value in line.items() if name.startswith("system/gpu")}


@pytest.mark.usefixtures("_nvml")
@pytest.mark.parametrize("uuid", ["GPU-1", "MIG-1"])
def test_what_nvml_knows_of_a_processs_gpu_is_in_its_metrics(
    uuid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_metrics, "_own_uuid", lambda: uuid)
    memory = {"system/gpu_memory_used_bytes": float(60 << 30)}
    load = {"system/gpu_percent": 97.0, "system/gpu_power_watts": 412.5, "system/gpu_temperature_celsius": 63.0}
    assert _logged(tmp_path) == (memory | load if uuid == "GPU-1" else memory)


def test_without_a_gpu_or_without_its_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    (tmp_path / "gpu").mkdir()
    gpu_metrics._handle.cache_clear()
    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert _logged(tmp_path) == {}
    monkeypatch.setattr(gpu_metrics, "_own_uuid", lambda: "GPU-1")
    assert _logged(tmp_path / "gpu") == {}
