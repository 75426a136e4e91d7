"""The page `docs/settings.md`, made from the structs of `pipeline.settings`:

python -m pipeline._settings_reference > docs/settings.md
"""

from __future__ import annotations

from typing import Final

import msgspec

from pipeline._settings_checks import expected
from pipeline.settings import SECTIONS, metadata, shown

_HEAD: Final = """# Settings

One TOML file, found as `--config`, else `MILLRACE_CONFIG`, else `./millrace.toml`. Ten lines are enough; everything else has a default:

    [kafka]
    bootstrap_servers = "127.0.0.1:9092"

    [topics]
    domain = "plant"

    [readings]
    fields = ["temperature"]

    [windows]
    size = "1h"

    [forecast]
    horizon = 24

Every key is also an environment variable, `MILLRACE_` + section + `__` + key in capitals (`MILLRACE_WINDOWS__SIZE=5m`; lists as
`a,b` or `["a", "b"]`). A flag goes over the environment, the environment over the file. `millrace config show` prints every key with
its value and where it came from, secrets masked; `millrace config validate` ends with exit status 2 and the offending key if one is
wrong. A misspelt key is an error that offers the nearest known one.

Durations are texts: a number and `ms`, `s`, `m`, `h`, `d` or `w`, such as `"90s"`, `"1.5h"` or `"1h30m"`.
"""


def reference() -> str:
    """Markdown: one section a table, one key a row."""
    return _HEAD + "".join(f"\n## [{name}]\n{_section(name)}" for name in SECTIONS)


def _section(name: str) -> str:
    section = SECTIONS[name]
    rows = ["", "| key | default | takes | meaning |", "|---|---|---|---|"]
    for info in msgspec.structs.fields(section):
        meta = metadata(info.type)
        # What follows from other keys has an empty default.
        default = "" if "empty" in (meta.extra or {}) else shown(info.default)
        text = msgspec.json.encode(default).decode().replace(",", ", ")
        rows.append(f"| `{info.encode_name}` | `{text}` | {expected(info.type)} | {meta.description} |")
    return f"\n{section.__doc__}\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
