"""Behind `pipeline.settings`: from texts to values key by key, and the checks of one key against another.

Every error is one line: key, value, where it came from, what was expected, how to mend it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NoReturn

import msgspec

from pipeline.errors import SettingsError
from pipeline.settings import MASK, SECTIONS, Duration, Section, Settings, is_secret, metadata, parse_duration, shown

MAX_TRANSACTION_MS: Final = 15 * 60_000

Given = dict[tuple[str, str], Any]
"""(section, TOML key) -> the value as it came."""


def gather(
    text: str, source: str, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[Given, dict[str, str]]:
    """What the file, the environment and the flags say, the later over the earlier, and which of them said it."""
    given: Given = {}
    sources: dict[str, str] = {}

    def put(section: str, key: str, value: Any, origin: str) -> None:
        _require_known(section, key, value, origin)
        given[section, key] = value
        sources[f"{section}.{key}"] = origin

    for section, keys in _toml(text, source).items():
        if not isinstance(keys, dict):
            raise SettingsError(
                f"{section} = {keys!r} ({source}): expected it inside a section; sections are {_list(SECTIONS)}"
            )
        _require_section(section, source)
        for key, value in keys.items():
            put(section, key, value, source)
    for name in sorted(environ):
        section, separator, key = name.removeprefix("MILLRACE_").partition("__")
        if name.startswith("MILLRACE_") and separator:
            put(section.lower(), key.lower(), environ[name], name)
    for path, value in overrides.items():
        section, _, key = path.partition(".")
        put(section, key, value, "--" + key.replace("_", "-"))
    return given, sources


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source} is no TOML: {error}") from None


def _require_section(section: str, origin: str) -> None:
    if section in SECTIONS:
        return
    raise SettingsError(f"unknown section [{section}] ({origin}){_nearest(section, SECTIONS, '[{}]')}")


def _require_known(section: str, key: str, value: Any, origin: str) -> None:
    _require_section(section, origin)
    names = [info.encode_name for info in msgspec.structs.fields(SECTIONS[section])]
    if key in names:
        return
    elsewhere = [
        other for other, kind in SECTIONS.items() if key in (i.encode_name for i in msgspec.structs.fields(kind))
    ]
    if elsewhere and not difflib.get_close_matches(key, names, 1):
        hint = f"; did you mean {elsewhere[0]}.{key}?"
    else:
        hint = _nearest(key, names, section + ".{}")
    raise SettingsError(f"unknown key {section}.{key} = {_quoted(value)} ({origin}){hint}")


def _nearest(word: str, known: Iterable[str], form: str) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {form.format(close[0])}?" if close else f"; expected one of {_list(known)}"


def convert(section: str, kind: type[Section], given: Mapping[str, Any], sources: Mapping[str, str]) -> Section:
    """One section's values, each checked by its own type and bounds."""
    values = {}
    for info in msgspec.structs.fields(kind):
        if info.encode_name in given:
            key = f"{section}.{info.encode_name}"
            values[info.name] = _value(key, info.type, given[info.encode_name], sources[key])
    return kind(**values)


def _value(key: str, type_: Any, raw: Any, origin: str) -> Any:
    """One value by its type; a text from the environment or a flag may stand for any type."""
    extra = metadata(type_).extra or {}
    from_text = isinstance(raw, str) and _is_text_source(origin)
    if raw == "":
        if "empty" in extra:
            return extra["empty"]
        if _is_optional(type_):
            return None
    value = _split(raw) if from_text and _holds_list(type_) else raw
    try:
        result = msgspec.convert(value, type_, strict=not from_text, dec_hook=_duration)
    except msgspec.ValidationError:
        wanted = expected(type_) + _nearest_choice(type_, raw)
        refuse(key, raw, origin, wanted, extra.get("example"), secret=is_secret(type_))
    durations = result if isinstance(result, tuple) else (result,)
    if extra.get("positive") and any(isinstance(item, Duration) and item <= 0 for item in durations):
        refuse(key, raw, origin, "a duration longer than 0", extra.get("example"))
    return result


def _nearest_choice(type_: Any, raw: Any) -> str:
    choices = typing.get_args(_bare(type_)) if typing.get_origin(_bare(type_)) is Literal else ()
    close = difflib.get_close_matches(raw, choices, 1) if isinstance(raw, str) else []
    return f"; did you mean {_quoted(close[0])}?" if close else ""


def _is_text_source(origin: str) -> bool:
    return origin.startswith(("MILLRACE_", "--"))


def _split(text: str) -> Any:
    """A list from one text: `["a", "b"]` as in TOML, or `a, b`."""
    if text.lstrip().startswith("["):
        try:
            return tomllib.loads(f"list = {text}")["list"]
        except tomllib.TOMLDecodeError:
            return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _duration(type_: type, raw: Any) -> Any:
    if type_ is Duration and isinstance(raw, str):
        return parse_duration(raw)
    raise ValueError("expected a duration")


def _bare(type_: Any) -> Any:
    return typing.get_args(type_)[0] if typing.get_origin(type_) is typing.Annotated else type_


def _is_optional(type_: Any) -> bool:
    return isinstance(_bare(type_), types.UnionType) and type(None) in typing.get_args(_bare(type_))


def _holds_list(type_: Any) -> bool:
    return typing.get_origin(_bare(type_)) is tuple


def expected(type_: Any) -> str:
    """What a key takes, in words."""
    meta, bare = metadata(type_), _bare(type_)
    if "expected" in (meta.extra or {}):
        return str((meta.extra or {})["expected"])
    if _is_optional(type_):
        return 'a duration such as "90s", "5m", "1h" or "7d", or "" for none'
    if _holds_list(type_):
        item = typing.get_args(bare)[0]
        words = {str: "texts", Duration: 'durations such as "24h"'}
        return f"a list of {words.get(item) or 'words out of ' + _list(typing.get_args(item))}"
    if typing.get_origin(bare) is Literal:
        return "one of " + ", ".join(_quoted(choice) for choice in typing.get_args(bare))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Duration: 'a duration such as "90s", "5m", "1h" or "7d"',
    }
    return names[bare] + _bounds(meta)


def _bounds(meta: msgspec.Meta) -> str:
    words = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
    parts = [words[name].format(getattr(meta, name)) for name in words if getattr(meta, name) is not None]
    if meta.min_length:
        parts.append("not empty")
    return ", " + " and ".join(parts) if parts else ""


def refuse(
    key: str, value: Any, origin: str, wanted: str, example: str | None = None, *, secret: bool = False
) -> NoReturn:
    mend = f"; for example {key.split('.')[1]} = {example}" if example else ""
    raise SettingsError(f"{key} = {MASK if secret else _quoted(value)} ({origin}): expected {wanted}{mend}")


def _quoted(value: Any) -> str:
    """A value as TOML writes it."""
    return msgspec.json.encode(shown(value)).decode() if not isinstance(value, str) else f'"{value}"'


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def resolve(settings: Settings) -> dict[str, Section]:
    """The sections in which an empty value follows from another key."""
    replace = msgspec.structs.replace
    kafka, readings, windows, forecast = settings.kafka, settings.readings, settings.windows, settings.forecast
    hop_ms = windows.hop_ms or windows.size_ms
    season_ms = forecast.season_ms
    if settings.source_of("forecast.season") == "default" and season_ms == type(forecast)().season_ms:
        season_ms = tuple(season for season in season_ms if season % hop_ms == 0 and season >= 2 * hop_ms)
    return {
        "kafka": replace(kafka, group_id=kafka.group_id or f"millrace-{settings.topics.domain}"),
        "readings": replace(readings, targets=readings.targets or readings.fields),
        "windows": replace(windows, hop_ms=hop_ms),
        "forecast": replace(forecast, season_ms=season_ms),
    }


def check(settings: Settings) -> None:
    """What no single key can know."""

    def wrong(key: str, wanted: str) -> NoReturn:
        section, name = key.split(".")
        infos = {info.encode_name: info.name for info in msgspec.structs.fields(SECTIONS[section])}
        refuse(key, getattr(getattr(settings, section), infos[name]), settings.source_of(key), wanted)

    _check_kafka(settings, wrong)
    _check_topics(settings, wrong)
    _check_readings(settings, wrong)
    _check_windows(settings, wrong)
    _check_forecast(settings, wrong)
    _check_learning(settings, wrong)


Wrong = typing.Callable[[str, str], NoReturn]


def _check_kafka(settings: Settings, wrong: Wrong) -> None:
    kafka = settings.kafka
    for server in kafka.bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            wrong("kafka.bootstrap_servers", 'host:port, several separated by commas, such as "127.0.0.1:9092"')
    if kafka.transaction_timeout_ms > MAX_TRANSACTION_MS:
        wrong("kafka.transaction_timeout", 'at most "15m", which is what a broker allows (transaction.max.timeout.ms)')
    uses_sasl = kafka.security_protocol.startswith("SASL")
    if kafka.sasl_mechanism and not uses_sasl:
        wrong(
            "kafka.sasl_mechanism",
            f'"" with security_protocol = "{kafka.security_protocol}"; set that to "SASL_SSL" or "SASL_PLAINTEXT"',
        )
    if uses_sasl and not kafka.sasl_mechanism:
        wrong(
            "kafka.sasl_mechanism", f'a mechanism such as "PLAIN" with security_protocol = "{kafka.security_protocol}"'
        )
    if kafka.sasl_mechanism.startswith(("PLAIN", "SCRAM")):
        for name in ("sasl_plain_username", "sasl_plain_password"):
            if not getattr(kafka, name):
                wrong(f"kafka.{name}", f'a text with sasl_mechanism = "{kafka.sasl_mechanism}"')
    if kafka.sasl_mechanism == "OAUTHBEARER":
        wrong(
            "kafka.sasl_mechanism",
            "another mechanism: OAUTHBEARER needs a token provider written in Python, which no setting can hold",
        )


def _check_topics(settings: Settings, wrong: Wrong) -> None:
    topics = settings.topics
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,200}", topics.domain):
        wrong("topics.domain", "1 to 200 letters, digits, dots, underscores and hyphens (Kafka's rule for topics)")
    seen: dict[str, str] = {}
    for key in ("readings", "forecasts", "dead_letters", "state", "models", "control", "scores"):
        name = getattr(topics, f"{key}_topic")
        if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", name) or name in (".", ".."):
            wrong(f"topics.{key}", "1 to 249 letters, digits, dots, underscores and hyphens (Kafka's rule for topics)")
        if name in seen:
            wrong(f"topics.{key}", f"another topic than topics.{seen[name]}, which is {name!r} too")
        seen[name] = key


def _check_readings(settings: Settings, wrong: Wrong) -> None:
    readings = settings.readings
    if not readings.fields or not all(readings.fields):
        wrong("readings.fields", 'at least one field, none of them empty, such as ["temperature"]')
    for name, fields in (
        ("fields", readings.fields),
        ("event_time", (readings.event_time,)),
        ("sensor", (readings.sensor,)),
    ):
        if any(character in '"\\' or character < " " for field in fields for character in field):
            wrong(f"readings.{name}", "field names without quotation marks, backslashes and control characters")
    if (twice := _twice(readings.fields)) is not None:
        wrong("readings.fields", f"each field once; {twice!r} is there twice")
    for target in readings.targets:
        if target not in readings.fields:
            wrong("readings.targets", f"fields out of readings.fields{_nearest(target, readings.fields, '{}')}")
    if (twice := _twice(readings.targets)) is not None:
        wrong("readings.targets", f"each field once; {twice!r} is there twice")
    for name in ("event_time", "sensor"):
        if getattr(readings, name) in readings.fields:
            wrong(f"readings.{name}", "a field that is not in readings.fields; remove it from one of the two")
    if readings.sensor and readings.sensor == readings.event_time:
        wrong("readings.sensor", "another field than readings.event_time")


def _check_windows(settings: Settings, wrong: Wrong) -> None:
    windows = settings.windows
    if windows.size_ms <= 0:
        wrong("windows.size", "a duration longer than 0")
    if windows.hop_ms <= 0 or windows.size_ms % windows.hop_ms:
        wrong("windows.hop", f'a duration that divides windows.size = "{shown(windows.size_ms)}" without rest')
    if not windows.aggregates:
        wrong("windows.aggregates", 'at least one, such as ["mean"]')
    if (twice := _twice(windows.aggregates)) is not None:
        wrong("windows.aggregates", f"each aggregate once; {twice!r} is there twice")


def _check_forecast(settings: Settings, wrong: Wrong) -> None:
    forecast, hop_ms = settings.forecast, settings.windows.hop_ms
    if not forecast.quantiles or list(forecast.quantiles) != sorted(set(forecast.quantiles)):
        wrong("forecast.quantiles", "ascending levels between 0 and 1, each once, such as [0.1, 0.5, 0.9]")
    for season in forecast.season_ms:
        text, hop = shown(season), shown(hop_ms)
        if season < 2 * hop_ms:
            wrong(
                "forecast.season",
                f'seasons of 2 steps or more; a step is windows.hop = "{hop}": remove "{text}" (season = [] for none)',
            )
        if season % hop_ms:
            wrong("forecast.season", f'multiples of windows.hop = "{hop}"; "{text}" is none')
    if list(forecast.season_ms) != sorted(set(forecast.season_ms)):
        wrong("forecast.season", "ascending lengths, each once")


def _check_learning(settings: Settings, wrong: Wrong) -> None:
    leads, horizon = settings.scoring.leads, settings.forecast.horizon
    if list(leads) != sorted(set(leads)) or any(lead > horizon for lead in leads):
        wrong("scoring.leads", f"ascending leads, each once, at most forecast.horizon = {horizon}")


def _twice(words: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None
