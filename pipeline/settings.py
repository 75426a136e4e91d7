"""Settings: one TOML file, environment variables, flags; typed, frozen, validated once, at the edge.

    defaults  <  millrace.toml  <  MILLRACE_SECTION__KEY  <  command line flags

The structs below are the list of every key: TOML name, type, default, bounds and meaning. `docs/settings.md` and
`millrace config show` are made from them. Durations are texts in TOML ("90s", "5m", "1h", "7d", "500ms") and whole
milliseconds in Python.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from pipeline.errors import SettingsError

__all__ = [
    "Duration",
    "ForecastSettings",
    "HttpSettings",
    "KafkaSettings",
    "ModelSettings",
    "ReadingSettings",
    "RetrainingSettings",
    "ScoringSettings",
    "Settings",
    "SettingsError",
    "StateSettings",
    "TopicSettings",
    "TrainingSettings",
    "WindowSettings",
    "describe",
    "format_duration",
    "load",
    "parse",
    "parse_duration",
]

MASK: Final = "********"
"""What is shown of a secret."""


class Duration(int):
    """Whole milliseconds; a text such as "5m" in TOML."""


_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])")


def parse_duration(text: str) -> Duration:
    """A text to milliseconds; ValueError for anything else.

    >>> [parse_duration(text) + 0 for text in ("90s", "5m", "1h", "7d", "500ms", "1h30m", "1.5h")]
    [90000, 300000, 3600000, 604800000, 500, 5400000, 5400000]
    """
    parts = _DURATION.findall(text.strip())
    if not parts or re.sub(r"\s", "", text) != "".join(number + unit for number, unit in parts):
        raise ValueError(f"{text!r} is no duration")
    total = sum(float(number) * _UNITS_MS[unit] for number, unit in parts)
    if total != int(total) or total >= 2**53:
        raise ValueError(f"{text!r} is no whole number of milliseconds")
    return Duration(total)


def format_duration(milliseconds: int) -> str:
    """The shortest exact text, in one unit.

    >>> [format_duration(ms) for ms in (0, 90_000, 3_600_000, 86_400_000, 604_800_000, 1_500)]
    ['0s', '90s', '1h', '1d', '7d', '1500ms']
    """
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS_MS[unit] == 0:
            return f"{milliseconds // _UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms" if milliseconds else "0s"


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One [section] of the file. `Meta.description` is the key's meaning; `Meta.extra` may hold

    expected: what to say instead of what follows from the type      example: a right value, as TOML
    empty: the value that "" stands for                               positive: True = zero is refused as well
    secret: True = masked wherever it is shown
    """

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name), is_secret(f.type)) for f in msgspec.structs.fields(self))
        inner = ", ".join(f"{name}={MASK if secret and value else value!r}" for name, value, secret in shown)
        return f"{type(self).__name__}({inner})"


class KafkaSettings(Section, frozen=True):
    """Where the broker is, and how to speak to it."""

    bootstrap_servers: Annotated[
        str,
        Meta(
            description="Brokers to ask first, `host:port`, separated by commas.",
            extra={"expected": "host:port, several separated by commas", "example": '"127.0.0.1:9092"'},
        ),
    ] = "127.0.0.1:9092"
    client_id: Annotated[str, Meta(description="The name in the broker's logs and quotas.", min_length=1)] = "millrace"
    group_id: Annotated[str, Meta(description="Consumer group; empty: `millrace-<domain>`.")] = ""
    group_instance_id: Annotated[
        str,
        Meta(description="Static membership: a name of this worker that stays the same over restarts; empty: none."),
    ] = ""
    session_timeout_ms: Annotated[
        Duration,
        Meta(
            description="A worker that gives no sign of life for so long loses its partitions to the others.",
            extra={"positive": True, "example": '"45s"'},
        ),
    ] = field(name="session_timeout", default=parse_duration("45s"))
    processing_guarantee: Annotated[
        Literal["exactly_once", "at_least_once"],
        Meta(
            description="exactly_once: forecasts, dead letters, state and offsets are one transaction. at_least_once: a crash "
            "may send some forecasts twice; nothing waits for transactions but checkpoints."
        ),
    ] = "exactly_once"
    transaction_timeout_ms: Annotated[
        Duration,
        Meta(
            description="A transaction that takes longer is aborted and tried again; one left open by a worker that died "
            "holds up readers of committed records for so long, or until a worker of the same group_instance_id starts.",
            extra={"positive": True, "example": '"30s"'},
        ),
    ] = field(name="transaction_timeout", default=parse_duration("30s"))
    compression: Annotated[
        Literal["none", "gzip", "snappy", "lz4", "zstd"], Meta(description="How record batches sent are compressed.")
    ] = "lz4"
    security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], Meta(description="As every Kafka client calls it.")
    ] = "PLAINTEXT"
    sasl_mechanism: Annotated[
        Literal["", "PLAIN", "GSSAPI", "OAUTHBEARER", "SCRAM-SHA-256", "SCRAM-SHA-512", "AWS_MSK_IAM"],
        Meta(description="With security_protocol SASL_PLAINTEXT or SASL_SSL; empty: none."),
    ] = ""
    sasl_plain_username: Annotated[str, Meta(description="User name, for PLAIN and SCRAM.")] = ""
    sasl_plain_password: Annotated[
        str, Meta(description="Password, for PLAIN and SCRAM. Masked wherever it is shown.", extra={"secret": True})
    ] = ""
    sasl_kerberos_name: Annotated[str, Meta(description="GSSAPI: the service's full name.")] = ""
    sasl_kerberos_service_name: Annotated[str, Meta(description="GSSAPI: the service's name; empty: `kafka`.")] = ""
    sasl_kerberos_domain_name: Annotated[str, Meta(description="GSSAPI: the broker's domain; empty: its host.")] = ""
    ssl_check_hostname: Annotated[bool, Meta(description="The certificate must bear the broker's host name.")] = True
    ssl_cafile: Annotated[str, Meta(description="File of the authority's certificate; empty: the system's.")] = ""
    ssl_certfile: Annotated[str, Meta(description="File of the client's certificate; empty: none.")] = ""
    ssl_keyfile: Annotated[str, Meta(description="File of the client's private key; empty: none.")] = ""
    ssl_crlfile: Annotated[str, Meta(description="File of revoked certificates; empty: none.")] = ""
    ssl_password: Annotated[
        str, Meta(description="Password of the private key. Masked wherever it is shown.", extra={"secret": True})
    ] = ""
    ssl_ciphers: Annotated[str, Meta(description="OpenSSL cipher list; empty: the system's.")] = ""

    def client_options(self, *, admin: bool = False) -> dict[str, Any]:
        """Keyword arguments for kafka-python's KafkaConsumer and KafkaProducer: servers, client id, security.

        `admin=True`: for KafkaAdminClient, which knows no `ssl_ciphers`.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": [server.strip() for server in self.bootstrap_servers.split(",")],
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
        }
        if "SSL" in self.security_protocol:
            options["ssl_check_hostname"] = self.ssl_check_hostname
        passed_on = (f.name for f in msgspec.structs.fields(self) if f.name.startswith(("sasl_", "ssl_")))
        options |= {name: getattr(self, name) for name in passed_on if getattr(self, name) not in ("", True, False)}
        if admin:
            options.pop("ssl_ciphers", None)
        return options


class TopicSettings(Section, frozen=True):
    """Names of the topics, and how they are made. An empty name follows from the domain."""

    domain: Annotated[str, Meta(description="First part of every topic's name.")] = "plant"
    readings: Annotated[str, Meta(description="Input; empty: `<domain>.readings.v1`.")] = ""
    forecasts: Annotated[str, Meta(description="Output; empty: `<domain>.forecasts.v1`.")] = ""
    dead_letters: Annotated[str, Meta(description="Refused records; empty: `<domain>.dead-letters.v1`.")] = ""
    state: Annotated[str, Meta(description="Changelog of sensor states; empty: `<domain>.state.v1`.")] = ""
    models: Annotated[str, Meta(description="Models; empty: `<domain>.models.v1`.")] = ""
    control: Annotated[str, Meta(description="Requests; empty: `<domain>.control.v1`.")] = ""
    scores: Annotated[str, Meta(description="Scores of closed windows; empty: `<domain>.scores.v1`.")] = ""
    partitions: Annotated[int, Meta(description="Partitions of a topic that is created.", ge=1, le=10_000)] = 4
    replication_factor: Annotated[int, Meta(description="Replicas of a topic that is created.", ge=1, le=32_767)] = 1
    readings_retention_ms: Annotated[
        Duration | None, Meta(description="How long readings are kept; empty: forever.", extra={"positive": True})
    ] = field(name="readings_retention", default=None)
    forecasts_retention_ms: Annotated[
        Duration | None, Meta(description="How long forecasts are kept; empty: forever.", extra={"positive": True})
    ] = field(name="forecasts_retention", default=parse_duration("7d"))
    dead_letters_retention_ms: Annotated[
        Duration | None, Meta(description="How long dead letters are kept; empty: forever.", extra={"positive": True})
    ] = field(name="dead_letters_retention", default=parse_duration("30d"))

    @property
    def readings_topic(self) -> str:
        return self.readings or f"{self.domain}.readings.v1"

    @property
    def forecasts_topic(self) -> str:
        return self.forecasts or f"{self.domain}.forecasts.v1"

    @property
    def dead_letters_topic(self) -> str:
        return self.dead_letters or f"{self.domain}.dead-letters.v1"

    @property
    def state_topic(self) -> str:
        return self.state or f"{self.domain}.state.v1"

    @property
    def models_topic(self) -> str:
        return self.models or f"{self.domain}.models.v1"

    @property
    def control_topic(self) -> str:
        return self.control or f"{self.domain}.control.v1"

    @property
    def scores_topic(self) -> str:
        return self.scores or f"{self.domain}.scores.v1"


class ReadingSettings(Section, frozen=True):
    """What a message on the readings topic looks like."""

    event_time: Annotated[str, Meta(description="Field of the event time; empty: the record's timestamp.")] = "ts"
    sensor: Annotated[str, Meta(description="Field of the sensor id; empty: the record's key.")] = ""
    fields: Annotated[
        tuple[str, ...], Meta(description="Numeric fields that are read.", extra={"example": '["temperature"]'})
    ] = ("value",)
    targets: Annotated[
        tuple[str, ...], Meta(description="Fields that are forecast; empty: all of `fields`.", extra={"example": "[]"})
    ] = ()
    max_ahead_ms: Annotated[
        Duration | None, Meta(description="How far event time may be ahead of the record's timestamp; empty: any.")
    ] = field(name="max_ahead", default=parse_duration("1h"))
    max_behind_ms: Annotated[
        Duration | None, Meta(description="How far event time may be behind the record's timestamp; empty: any.")
    ] = field(name="max_behind", default=None)
    max_bytes: Annotated[int, Meta(description="Longest value that is read, in bytes.", ge=2)] = 65_536
    max_sensor_bytes: Annotated[int, Meta(description="Longest sensor id, in bytes of UTF-8.", ge=1, le=32_767)] = 256


class WindowSettings(Section, frozen=True):
    """How readings become steps."""

    size_ms: Annotated[
        Duration, Meta(description="Length of a window.", extra={"positive": True, "example": '"1h"'})
    ] = field(name="size", default=parse_duration("1h"))
    hop_ms: Annotated[
        Duration,
        Meta(
            description="A window starts every so often, and is one step; empty: `size`. `size` is a multiple of it.",
            extra={"positive": True, "empty": Duration(0), "example": '"1h"'},
        ),
    ] = field(name="hop", default=Duration(0))
    grace_ms: Annotated[
        Duration, Meta(description="How long a window waits for stragglers after its end.", extra={"example": '"5m"'})
    ] = field(name="grace", default=Duration(0))
    aggregates: Annotated[
        tuple[Literal["mean", "sum", "min", "max", "last", "count"], ...],
        Meta(
            description="What a step holds of each field; the first of them is what is forecast.",
            extra={"example": '["mean"]'},
        ),
    ] = ("mean",)
    max_gap_steps: Annotated[
        int, Meta(description="Steps without a reading before a sensor's memory is reset.", ge=0)
    ] = field(name="max_gap", default=24)
    late: Annotated[
        Literal["dead-letter", "drop"], Meta(description="What becomes of a reading whose windows have all closed.")
    ] = "dead-letter"


class ForecastSettings(Section, frozen=True):
    """What is forecast."""

    horizon: Annotated[int, Meta(description="How many steps ahead.", ge=1, le=10_000)] = 24
    quantiles: Annotated[
        tuple[Annotated[float, Meta(gt=0, lt=1)], ...],
        Meta(
            description="Levels, ascending, between 0 and 1.",
            extra={"expected": "ascending levels between 0 and 1", "example": "[0.1, 0.5, 0.9]"},
        ),
    ] = (0.1, 0.5, 0.9)
    season_ms: Annotated[
        tuple[Duration, ...],
        Meta(
            description="Lengths of seasons, ascending, each a multiple of the hop; `[]`: none. "
            "The default is left out where the hop does not divide it into 2 steps or more.",
            extra={"positive": True, "example": '["24h"]'},
        ),
    ] = field(name="season", default=(parse_duration("24h"),))
    estimate_season: Annotated[
        bool,
        Meta(
            description="Training tells the seasons from its history, and says which; a model brings them along. `season` holds until "
            "there is one."
        ),
    ] = False
    profile: Annotated[
        Literal["base", "lean", "accuracy"],
        Meta(
            description="What stands around the RNN: `base` nothing; `lean` stages that learn online, so that there are good forecasts "
            "before there is a trained model; `accuracy` more of them."
        ),
    ] = "base"
    warmup_steps: Annotated[int, Meta(description="Steps of a sensor before the model answers for it.", ge=0)] = field(
        name="warmup", default=12
    )
    provisional_after_ms: Annotated[
        Duration | None,
        Meta(
            description="When a whole partition has been silent for so long, its last open windows are forecast from all the "
            "same, once, with status `provisional`, if time going on like a clock would have closed them; empty: never.",
            extra={"positive": True},
        ),
    ] = field(name="provisional_after", default=None)


class StateSettings(Section, frozen=True):
    """How the sensors' states are kept in the changelog topic."""

    checkpoint_every_ms: Annotated[
        Duration,
        Meta(
            description="States that changed are written so often; what came in since then is read again after a crash.",
            extra={"positive": True, "example": '"10s"'},
        ),
    ] = field(name="checkpoint_every", default=parse_duration("10s"))


class HttpSettings(Section, frozen=True):
    """Where Prometheus finds the metrics."""

    address: Annotated[str, Meta(description="Interface to listen on.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(description="Port of the worker's `/metrics`; 0: off.", ge=0, le=65_535)] = 0
    trainer_port: Annotated[int, Meta(description="Port of the trainer's `/metrics`; 0: off.", ge=0, le=65_535)] = 0


class ModelSettings(Section, frozen=True):
    """The recurrent network."""

    cell: Annotated[Literal["simple_rnn", "lstm", "gru"], Meta(description="simple_rnn, lstm or gru.")] = "gru"
    units: Annotated[int, Meta(description="Size of the hidden state of a layer.", ge=1, le=8_192)] = 64
    layers: Annotated[int, Meta(description="Layers stacked.", ge=1, le=16)] = 1
    path: Annotated[
        str,
        Meta(
            description="Folder that `millrace train` writes. A worker that finds no champion on the models topic puts it there.",
            min_length=1,
        ),
    ] = "model"
    rewarm_steps: Annotated[
        int,
        Meta(
            description="Steps of each sensor that are remembered beyond the season, so that a new model can be run through them "
            "when it takes over; 0: it begins with empty hidden states.",
            ge=0,
            le=4_096,
        ),
    ] = field(name="rewarm", default=64)


class TrainingSettings(Section, frozen=True):
    """How a model is trained."""

    history_ms: Annotated[
        Duration | None,
        Meta(
            description="Only the newest so much of the readings, by event time; empty: all.", extra={"positive": True}
        ),
    ] = field(name="history", default=None)
    epochs: Annotated[int, Meta(description="Passes over the history, at most.", ge=1)] = 20
    patience: Annotated[int, Meta(description="Passes without a better score before it stops.", ge=1)] = 8
    chunk_steps: Annotated[int, Meta(description="Steps that back-propagation goes back through time.", ge=1)] = field(
        name="chunk", default=96
    )
    lanes: Annotated[int, Meta(description="Sequences side by side in a batch.", ge=1)] = 64
    learning_rate: Annotated[float, Meta(description="Adam's step size.", gt=0, le=1)] = 0.003
    holdout: Annotated[float, Meta(description="Newest share of the history, held back to judge by.", gt=0, lt=1)] = 0.2
    seed: Annotated[int, Meta(description="Of weights and shuffling: the same seed, the same model.", ge=0)] = 0


class RetrainingSettings(Section, frozen=True):
    """When the trainer learns again, and what a new model must show. Times are event time."""

    every_ms: Annotated[
        Duration | None,
        Meta(description="Learn again so often, by event time; empty: never.", extra={"positive": True}),
    ] = field(name="every", default=parse_duration("1d"))
    every_steps: Annotated[
        int,
        Meta(description="Learn again after so many steps (closed windows, of all sensors together); 0: never.", ge=0),
    ] = 0
    on_drift: Annotated[bool, Meta(description="Learn again when the matured error has risen.")] = True
    drift_threshold: Annotated[
        float,
        Meta(
            description="Page-Hinkley threshold, in standard deviations of a window's error; higher: fewer alarms.",
            gt=0,
        ),
    ] = 12.0
    settle_ms: Annotated[
        Duration | None,
        Meta(
            description="After a drift alarm the trainer waits so long, so that there is something new to learn from; empty: "
            "the longest season, or the horizon."
        ),
    ] = field(name="settle", default=None)
    cooldown_ms: Annotated[
        Duration, Meta(description="No drift alarm counts for so long after a decision.", extra={"example": '"6h"'})
    ] = field(name="cooldown", default=parse_duration("6h"))
    max_per_day: Annotated[int, Meta(description="Trainings begun in a day of event time, at most.", ge=1)] = 4
    epochs: Annotated[
        int,
        Meta(
            description="Passes over the history, at most, where the champion's weights are the beginning; never more than "
            "training.epochs.",
            ge=1,
        ),
    ] = 20
    max_steps: Annotated[
        int,
        Meta(
            description="Steps held in memory to learn from; of a larger history every second, fourth, ... sensor is taken.",
            ge=1_000,
        ),
    ] = 1_000_000
    margin: Annotated[
        float,
        Meta(description="A challenger's pinball loss must be lower than the champion's by this share.", ge=0, lt=1),
    ] = 0.01
    max_lead_loss: Annotated[
        float,
        Meta(
            description="At no lead may its pinball loss be higher than the champion's by more than this share.", ge=0
        ),
    ] = 0.05
    min_labels: Annotated[int, Meta(description="Matured labels that a decision needs.", ge=1)] = 1_000
    rollback: Annotated[bool, Meta(description="The previous champion returns when the new one disappoints.")] = True
    rollback_margin: Annotated[
        float,
        Meta(
            description="It disappoints when its error, relative to the baseline's, is higher than before by this share.",
            gt=0,
        ),
    ] = 0.2
    probation_ms: Annotated[
        Duration | None,
        Meta(
            description="How long after a swap a champion can be rolled back; empty: two seasons, or two horizons.",
            extra={"positive": True},
        ),
    ] = field(name="probation", default=None)
    keep_versions: Annotated[
        int,
        Meta(
            description="Versions kept on the models topic: a backtest can repeat what was said live as far back as they go.",
            ge=2,
        ),
    ] = 60
    threads: Annotated[int, Meta(description="Threads that training may use; 0: as many as there are cores.", ge=0)] = 1


class ScoringSettings(Section, frozen=True):
    """Forecasts held against what came."""

    leads: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(
            description="Leads that are scored while the service runs; empty: the first, the last and one between.",
            extra={"expected": "leads between 1 and forecast.horizon, ascending", "example": "[1, 24]"},
        ),
    ] = ()
    publish: Annotated[
        bool, Meta(description="Write the scores of each closed window to `topics.scores`; the trainer lives on them.")
    ] = True


class Settings(Struct, frozen=True, kw_only=True):
    """All sections, checked against each other; empty values that follow from others are filled in."""

    kafka: KafkaSettings = field(default_factory=KafkaSettings)
    topics: TopicSettings = field(default_factory=TopicSettings)
    readings: ReadingSettings = field(default_factory=ReadingSettings)
    windows: WindowSettings = field(default_factory=WindowSettings)
    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    state: StateSettings = field(default_factory=StateSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    retraining: RetrainingSettings = field(default_factory=RetrainingSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    sources: dict[str, str] = field(default_factory=dict)
    """TOML key -> where its value came from, for those that are not defaults."""

    def __post_init__(self) -> None:
        from pipeline._settings_checks import check, resolve

        for name, section in resolve(self).items():
            msgspec.structs.force_setattr(self, name, section)
        check(self)

    def __repr__(self) -> str:
        return "Settings(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in SECTIONS) + ")"

    def source_of(self, key: str) -> str:
        """Where the value of "windows.size" came from: "default", the file, an environment variable or a flag."""
        return self.sources.get(key, "default")


SECTIONS: Final[dict[str, type[Section]]] = {
    "kafka": KafkaSettings,
    "topics": TopicSettings,
    "readings": ReadingSettings,
    "windows": WindowSettings,
    "forecast": ForecastSettings,
    "state": StateSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "retraining": RetrainingSettings,
    "scoring": ScoringSettings,
    "http": HttpSettings,
}


def load(
    path: Path | None = None, environ: Mapping[str, str] = os.environ, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of this process.

    path: the file; else MILLRACE_CONFIG, else ./millrace.toml, which may be absent.
    overrides: {"kafka.bootstrap_servers": "..."}, what flags say: over the environment, which goes over the file.
    SettingsError: names the key, its value, where it came from, what was expected and how to mend it.
    """
    named = path or (Path(environ["MILLRACE_CONFIG"]) if environ.get("MILLRACE_CONFIG") else None)
    file = named or Path("millrace.toml")
    if named is None and not file.exists():
        return parse("", str(file), environ, overrides)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        origin = "--config" if path else "MILLRACE_CONFIG" if named else "the working folder"
        raise SettingsError(
            f"cannot read the settings file {str(file)!r} ({origin}): {reason}; expected a TOML file"
        ) from None
    return parse(text, str(file), environ, overrides)


def parse(
    text: str,
    source: str = "millrace.toml",
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from TOML text; `source` is what errors and `source_of` call it.

    >>> settings = parse('[windows]\\nsize = "5m"', environ={"MILLRACE_FORECAST__HORIZON": "12"})
    >>> settings.windows.size_ms + 0, settings.windows.hop_ms + 0, settings.forecast.horizon
    (300000, 300000, 12)
    >>> settings.source_of("windows.size"), settings.source_of("forecast.horizon"), settings.source_of("windows.hop")
    ('millrace.toml', 'MILLRACE_FORECAST__HORIZON', 'default')
    """
    from pipeline._settings_checks import convert, gather

    given, sources = gather(text, source, environ or {}, overrides or {})
    sections = {
        name: convert(name, section, {key: value for (s, key), value in given.items() if s == name}, sources)
        for name, section in SECTIONS.items()
    }
    return Settings(**sections, sources=sources)  # type: ignore[arg-type]


def changed(settings: Settings, values: Mapping[str, Any], source: str) -> Settings:
    """The same settings with some keys set otherwise; what follows from them follows anew. values: TOML key -> value; source: what
    errors and `source_of` call it.

    >>> changed(Settings(), {"windows.size": "15m"}, "the file").windows.hop_ms + 0
    900000
    """
    from pipeline._settings_checks import convert

    sources = settings.sources | dict.fromkeys(values, source)
    left, sections = dict(values), {}
    hop_ms = settings.windows.hop_ms
    followed: dict[str, Any] = {  # what is so because of another key follows that key
        "kafka.group_id": f"millrace-{settings.topics.domain}",
        "readings.targets": settings.readings.fields,
        "windows.hop": settings.windows.size_ms,
        "forecast.season": tuple(
            season for season in ForecastSettings().season_ms if season % hop_ms == 0 and season >= 2 * hop_ms
        ),
    }
    explicit = ("forecast.season",)  # `[]` means none; in the others an empty value means that they follow
    for name, section in SECTIONS.items():
        defaults, given = section(), {}
        for info in msgspec.structs.fields(section):
            key, value = f"{name}.{info.encode_name}", getattr(getattr(settings, name), info.name)
            if key in left:
                given[info.encode_name] = left.pop(key)
            elif key in followed and value == followed[key] and not (key in explicit and key in settings.sources):
                continue
            elif key in sources or value != getattr(defaults, info.name):
                given[info.encode_name] = shown(value)
                sources.setdefault(key, "Python")
        sections[name] = convert(name, section, given, sources)
    if left:
        raise ValueError(f"{', '.join(left)}: no such setting")
    return Settings(**sections, sources=sources)  # type: ignore[arg-type]


def describe(settings: Settings) -> list[dict[str, Any]]:
    """One row a key, in the order of the file: `key`, `value` as TOML would say it (secrets masked), `source`."""
    rows = []
    for name, section in SECTIONS.items():
        for info in msgspec.structs.fields(section):
            key = f"{name}.{info.encode_name}"
            value = shown(getattr(getattr(settings, name), info.name))
            if is_secret(info.type) and value:
                value = MASK
            if name == "topics":
                value = getattr(settings.topics, f"{info.name}_topic", value)
            rows.append({"key": key, "value": value, "source": settings.source_of(key)})
    return rows


def to_toml(settings: Settings) -> str:
    """The settings in force as a file that says all of them; secrets are left out.

    >>> parse(to_toml(parse('[windows]\\nsize = "5m"'))).windows.size_ms + 0
    300000
    """
    lines: list[str] = []
    for row in describe(settings):
        section, _, key = row["key"].partition(".")
        if f"[{section}]" not in lines:
            lines += ["", f"[{section}]"]
        if row["value"] == MASK:
            lines.append(f"# {key}: a secret, left out")
        else:
            text = msgspec.json.encode(row["value"]).decode().replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}")
    return "\n".join(lines[1:]) + "\n"


def shown(value: Any) -> Any:
    """A value as TOML writes it: durations as texts, tuples as lists, None as an empty text."""
    if isinstance(value, Duration):
        return format_duration(value)
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    return "" if value is None else value


def metadata(type_: Any) -> Meta:
    """The Meta of a key's type; an empty one where it has none."""
    return next((item for item in getattr(type_, "__metadata__", ()) if isinstance(item, Meta)), Meta())


def is_secret(type_: Any) -> bool:
    return bool((metadata(type_).extra or {}).get("secret"))
