"""Keys that had another name in the previous version. They work for one more version, with a warning."""

from __future__ import annotations

from typing import Any

RENAMED = {  # at any depth
    "picture_every": "log_images_every",
    "revive_below": "dead_code_threshold",
    "usage_weight": "batch_entropy_weight",
    "training_pictures": "training_images",
}


def with_current_names(values: Any, found: dict[str, str] | None = None) -> Any:
    """`values`, nested dicts and lists, with today's keys. Each renamed key is added to `found`, old name to new."""
    if isinstance(values, list):
        return [with_current_names(item, found) for item in values]
    if not isinstance(values, dict):
        return values
    current: dict[Any, Any] = {}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if key in RENAMED and found is not None:
            found[key] = RENAMED[key]
        current[name] = with_current_names(value, found)  # of two names, the later one: an override
    return current
