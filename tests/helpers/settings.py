"""Settings for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.settings import Settings


def again(settings: Settings, **changes: Any) -> Settings:
    """The same deployment with some keys set otherwise."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    replaced = {name: msgspec.structs.replace(getattr(settings, name), **keys) for name, keys in sections.items()}
    return msgspec.structs.replace(settings, **replaced)
