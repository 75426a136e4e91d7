"""Settings: where values come from, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline._settings_reference import reference
from pipeline.settings import (
    SECTIONS,
    Settings,
    SettingsError,
    changed,
    describe,
    format_duration,
    load,
    parse,
    parse_duration,
    to_toml,
)

REPOSITORY = Path(__file__).parents[2]
TEN_LINES = """
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
"""


def test_ten_lines_are_enough():
    settings = parse(TEN_LINES)
    assert settings.readings.targets == ("temperature",)
    assert settings.windows.hop_ms == settings.windows.size_ms == 3_600_000
    assert settings.topics.readings_topic == "plant.readings.v1"
    assert settings.topics.dead_letters_topic == "plant.dead-letters.v1"
    assert settings.kafka.group_id == "millrace-plant"
    assert settings.topics.readings_retention_ms is None


def test_no_file_at_all_gives_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(None, {}) == Settings()


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(tmp_path):
    file = tmp_path / "millrace.toml"
    file.write_text('[windows]\nsize = "5m"\ngrace = "1m"\n[kafka]\nbootstrap_servers = "a:1"\n')
    environ = {"MILLRACE_WINDOWS__SIZE": "10m", "MILLRACE_KAFKA__BOOTSTRAP_SERVERS": "b:2"}
    settings = load(file, environ, {"kafka.bootstrap_servers": "c:3"})
    assert settings.kafka.bootstrap_servers == "c:3"
    assert (settings.windows.size_ms, settings.windows.grace_ms) == (600_000, 60_000)
    assert settings.source_of("kafka.bootstrap_servers") == "--bootstrap-servers"
    assert settings.source_of("windows.size") == "MILLRACE_WINDOWS__SIZE"
    assert settings.source_of("windows.grace") == str(file)
    assert settings.source_of("windows.late") == "default"


def test_the_file_is_the_one_named_else_that_of_the_environment_else_the_one_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, horizon in (("millrace.toml", 1), ("environ.toml", 2), ("named.toml", 3)):
        (tmp_path / name).write_text(f"[forecast]\nhorizon = {horizon}\n")
    environ = {"MILLRACE_CONFIG": "environ.toml"}
    assert load(None, {}).forecast.horizon == 1
    assert load(None, environ).forecast.horizon == 2
    assert load(Path("named.toml"), environ).forecast.horizon == 3


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(SettingsError, match=r"gone\.toml.*--config.*No such file"):
        load(tmp_path / "gone.toml", {})
    with pytest.raises(SettingsError, match="MILLRACE_CONFIG"):
        load(None, {"MILLRACE_CONFIG": str(tmp_path / "gone.toml")})


@pytest.mark.parametrize("text", ["a,b", "a, b", '["a", "b"]'])
def test_a_list_in_the_environment_is_written_with_commas_or_as_in_toml(text):
    assert parse("", environ={"MILLRACE_READINGS__FIELDS": text}).readings.fields == ("a", "b")


def test_numbers_and_durations_in_the_environment_are_texts():
    environ = {"MILLRACE_FORECAST__QUANTILES": "0.25, 0.75", "MILLRACE_TRAINING__HOLDOUT": "0.5"}
    environ |= {"MILLRACE_FORECAST__SEASON": "24h,7d", "MILLRACE_KAFKA__SSL_CHECK_HOSTNAME": "false"}
    settings = parse("", environ=environ)
    assert settings.forecast.quantiles == (0.25, 0.75)
    assert settings.forecast.season_ms == (86_400_000, 604_800_000)
    assert settings.training.holdout == 0.5
    assert settings.kafka.ssl_check_hostname is False


def test_variables_that_are_no_settings_are_left_alone():
    assert parse("", environ={"MILLRACE_TEST_BROKER": "docker", "PATH": "x__y", "MILLRACE_CONFIG": "z"}) == Settings()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[windows]\nsze = "1h"', ['windows.sze = "1h"', "millrace.toml", "did you mean windows.size?"]),
        ("[windows]\nhorizon = 3", ["windows.horizon = 3", "did you mean forecast.horizon?"]),
        ("[window]", ["[window]", "did you mean [windows]?"]),
        ("[scoring]\nleads = [1, 25]", ["scoring.leads", "[1,25]", "forecast.horizon = 24"]),
        ("horizon = 3", ["horizon = 3", "inside a section"]),
        ('[windows]\nsize = "10 parsecs"', ['windows.size = "10 parsecs"', "a duration such as", 'size = "1h"']),
        ("[windows]\nsize = 60", ["windows.size = 60", "a duration such as"]),
        ('[windows]\nsize = ""', ['windows.size = ""', "a duration such as"]),
        ('[windows]\nsize = "0s"', ['windows.size = "0s"', "longer than 0"]),
        ('[windows]\nhop = "0s"', ['windows.hop = "0s"', "longer than 0"]),
        ('[windows]\nhop = "25m"', ['windows.hop = "25m"', 'divides windows.size = "1h"']),
        ('[windows]\nhop = "2h"', ['windows.hop = "2h"', 'divides windows.size = "1h"']),
        ("[windows]\naggregates = []", ["windows.aggregates = []", "at least one"]),
        ('[windows]\naggregates = ["mean", "mean"]', ["windows.aggregates", "'mean' is there twice"]),
        ('[windows]\naggregates = ["median"]', ['windows.aggregates = ["median"]', "mean, sum, min, max, last, count"]),
        ('[windows]\nlate = "drp"', ['windows.late = "drp"', 'did you mean "drop"?']),
        ("[windows]\nmax_gap = -1", ["windows.max_gap = -1", "at least 0"]),
        ("[readings]\nfields = []", ["readings.fields = []", "at least one field"]),
        ('[readings]\nfields = ["a", "a"]', ["readings.fields", "'a' is there twice"]),
        ('[readings]\nfields = ["a", 3]', ['readings.fields = ["a",3]', "a list of texts"]),
        ('[readings]\nfields = ["heat"]\ntargets = ["heta"]', ['readings.targets = ["heta"]', "did you mean heat?"]),
        ('[readings]\nfields = ["ts"]', ['readings.event_time = "ts"', "not in readings.fields"]),
        ('[readings]\nsensor = "ts"', ['readings.sensor = "ts"', "another field than readings.event_time"]),
        ("[forecast]\nhorizon = 0", ["forecast.horizon = 0", "at least 1"]),
        ('[forecast]\nhorizon = "24"', ['forecast.horizon = "24"', "a whole number"]),
        ("[forecast]\nquantiles = []", ["forecast.quantiles = []", "ascending levels"]),
        ("[forecast]\nquantiles = [0.9, 0.1]", ["forecast.quantiles = [0.9,0.1]", "ascending levels"]),
        ("[forecast]\nquantiles = [0.1, 1.0]", ["forecast.quantiles = [0.1,1.0]", "between 0 and 1"]),
        ('[forecast]\nseason = ["1h"]', ['forecast.season = ["1h"]', "2 steps or more", "season = []"]),
        ('[forecast]\nseason = ["150m"]', ['forecast.season = ["150m"]', 'multiples of windows.hop = "1h"']),
        ('[forecast]\nseason = ["7d", "1d"]', ['forecast.season = ["7d","1d"]', "ascending"]),
        ('[forecast]\nprofile = "leen"', ['forecast.profile = "leen"', 'did you mean "lean"?']),
        ('[model]\ncell = "gruu"', ['model.cell = "gruu"', 'did you mean "gru"?']),
        ('[topics]\ndomain = "a b"', ['topics.domain = "a b"', "letters, digits"]),
        ('[topics]\nforecasts = "plant.readings.v1"', ["topics.forecasts", "another topic than topics.readings"]),
        ('[kafka]\nbootstrap_servers = "broker"', ['kafka.bootstrap_servers = "broker"', "host:port"]),
        ('[kafka]\nsasl_mechanism = "PLAIN"', ["kafka.sasl_mechanism", "SASL_SSL"]),
        ('[kafka]\nsecurity_protocol = "SASL_SSL"', ["kafka.sasl_mechanism", 'such as "PLAIN"']),
        ("[windows]\nsize = 1h", ["millrace.toml is no TOML", "line 2"]),
    ],
)
def test_what_is_wrong_is_named_with_its_value_its_source_and_what_was_expected(toml, words):
    with pytest.raises(SettingsError) as caught:
        parse(toml)
    for word in words:
        assert word in str(caught.value)


def test_an_error_names_the_variable_or_flag_it_came_from():
    with pytest.raises(SettingsError, match=r"unknown key windows\.sise = .*MILLRACE_WINDOWS__SISE.*windows\.size"):
        parse("", environ={"MILLRACE_WINDOWS__SISE": "1h"})
    with pytest.raises(SettingsError, match=r"forecast\.horizon = \"many\" \(MILLRACE_FORECAST__HORIZON\)"):
        parse("", environ={"MILLRACE_FORECAST__HORIZON": "many"})
    with pytest.raises(SettingsError, match=r"\(--bootstrap-servers\)"):
        parse("", overrides={"kafka.bootstrap_servers": "nowhere"})


def test_a_default_season_that_does_not_fit_the_steps_is_left_out():
    assert parse('[windows]\nsize = "1d"').forecast.season_ms == ()
    assert parse('[windows]\nsize = "7m"').forecast.season_ms == ()
    assert parse('[windows]\nsize = "12h"').forecast.season_ms == (86_400_000,)


def test_the_count_aggregate_may_stand_alone():
    assert parse('[windows]\naggregates = ["count"]').windows.aggregates == ("count",)


def test_settings_built_in_python_are_checked_as_well():
    from pipeline.settings import ForecastSettings

    with pytest.raises(SettingsError, match=r"forecast\.quantiles"):
        Settings(forecast=ForecastSettings(quantiles=(0.9, 0.1)))


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Settings().windows.size_ms = 1


SECURE = """
[kafka]
security_protocol = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
sasl_plain_username = "mill"
sasl_plain_password = "s3cret"
ssl_cafile = "ca.pem"
ssl_password = "s3cret"
ssl_ciphers = "HIGH"
"""


def test_secrets_are_shown_nowhere():
    settings = parse(SECURE)
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in str(settings.kafka)
    assert "s3cret" not in str(describe(settings))
    with pytest.raises(SettingsError) as caught:
        parse("[kafka]\nsasl_plain_password = 83741")
    assert "83741" not in str(caught.value)


def test_the_clients_get_what_security_needs_and_nothing_that_is_not_set():
    options = parse(SECURE).kafka.client_options()
    assert options == {
        "bootstrap_servers": ["127.0.0.1:9092"],
        "client_id": "millrace",
        "security_protocol": "SASL_SSL",
        "ssl_check_hostname": True,
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "mill",
        "sasl_plain_password": "s3cret",
        "ssl_cafile": "ca.pem",
        "ssl_password": "s3cret",
        "ssl_ciphers": "HIGH",
    }
    assert "ssl_ciphers" not in parse(SECURE).kafka.client_options(admin=True)
    assert set(Settings().kafka.client_options()) == {"bootstrap_servers", "client_id", "security_protocol"}


def test_every_security_option_of_the_client_that_a_file_can_hold_is_a_key():
    from kafka import KafkaConsumer

    objects = {"ssl_context", "sasl_oauth_token_provider"}  # made in Python
    known = {name for name in KafkaConsumer.DEFAULT_CONFIG if name.startswith(("sasl_", "ssl_", "security_"))} - objects
    keys = {info.encode_name for info in msgspec.structs.fields(SECTIONS["kafka"])}
    assert {key for key in keys if key.startswith(("sasl_", "ssl_", "security_"))} == known


def test_describe_says_every_key_once_with_its_value_and_source():
    rows = describe(parse('[windows]\nsize = "5m"'))
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows) == sum(len(msgspec.structs.fields(kind)) for kind in SECTIONS.values())
    assert by_key["windows.size"] == {"key": "windows.size", "value": "5m", "source": "millrace.toml"}
    assert by_key["windows.hop"] == {"key": "windows.hop", "value": "5m", "source": "default"}
    assert by_key["topics.readings"]["value"] == "plant.readings.v1"


def test_what_is_shown_can_be_written_into_a_file_again():
    settings = parse(TEN_LINES)
    given: dict[str, object] = {row["key"]: row["value"] for row in describe(settings)}
    again = parse("", overrides=given)
    assert msgspec.structs.replace(again, sources={}) == msgspec.structs.replace(
        settings,
        sources={},
        topics=again.topics,  # names written out
    )
    assert again.topics.forecasts_topic == settings.topics.forecasts_topic


# -- the same settings with some keys set otherwise

ALL_SORTS = """
[kafka]
bootstrap_servers = "a:1, b:2"
ssl_check_hostname = false
[topics]
domain = "mill"
scores = "elsewhere"
readings_retention = "7d"
forecasts_retention = ""
[readings]
fields = ["heat", "Tø °C", "a # b", "x = y"]
targets = ["x = y"]
max_ahead = ""
[windows]
size = "90s"
hop = "30s"
aggregates = ["last", "count"]
late = "drop"
[forecast]
horizon = 7
quantiles = [0.025, 0.5]
season = ["30m", "1h"]
[retraining]
every = "4d"
on_drift = false
margin = 1e-5
"""
ENVIRON = {
    "MILLRACE_TRAINING__HOLDOUT": "0.5",
    "MILLRACE_SCORING__LEADS": "1, 7",
    "MILLRACE_TOPICS__DEAD_LETTERS_RETENTION": "",
    "MILLRACE_WINDOWS__GRACE": "1m30s",
    "MILLRACE_MODEL__PATH": "5",
}


def without_sources(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, sources={})


def test_with_nothing_set_otherwise_everything_stays_where_it_came_from() -> None:
    for settings in (parse(""), parse(ALL_SORTS, environ=ENVIRON), parse(SECURE), parse(TEN_LINES)):
        again = changed(settings, {}, "nobody")
        assert again == settings
        assert again.sources == settings.sources


def test_what_is_set_otherwise_says_by_whom_and_the_rest_stays() -> None:
    settings = parse(ALL_SORTS, environ=ENVIRON, overrides={"topics.partitions": 9})
    after = changed(settings, {"forecast.horizon": 12, "windows.grace": "2m", "model.units": 5}, "the data")
    assert (after.forecast.horizon, after.windows.grace_ms, after.model.units) == (12, 120_000, 5)
    for key in ("forecast.horizon", "windows.grace", "model.units"):
        assert after.source_of(key) == "the data"
    assert after.source_of("windows.size") == "millrace.toml"
    assert after.source_of("training.holdout") == "MILLRACE_TRAINING__HOLDOUT"
    assert after.source_of("topics.partitions") == "--partitions"
    assert after.source_of("windows.late") == "millrace.toml"
    assert after.source_of("http.port") == "default"
    for name in SECTIONS:
        if name not in ("forecast", "windows", "model"):
            assert getattr(after, name) == getattr(settings, name)
    assert msgspec.structs.replace(after.forecast, horizon=7) == settings.forecast
    assert settings.forecast.horizon == 7


def test_what_follows_from_what_was_set_otherwise_follows_anew() -> None:
    after = changed(parse(""), {"windows.size": "15m", "readings.fields": ["y"], "topics.domain": "mill"}, "the data")
    assert after.windows.hop_ms == 900_000
    assert after.readings.targets == ("y",)
    assert after.kafka.group_id == "millrace-mill"
    assert after.topics.forecasts_topic == "mill.forecasts.v1"
    assert changed(parse(""), {"windows.size": "7m"}, "the data").forecast.season_ms == ()
    # The default season comes back with steps that it fits.
    seven = parse("[windows]\nsize = '7m'")
    assert seven.forecast.season_ms == ()
    assert changed(seven, {"windows.size": "6m"}, "the data").forecast.season_ms == (86_400_000,)


def test_what_was_set_does_not_follow() -> None:
    settings = parse(
        '[windows]\nhop = "5m"\n[readings]\nfields = ["a", "b"]\ntargets = ["b"]\n[kafka]\ngroup_id = "mine"'
    )
    after = changed(settings, {"windows.size": "15m", "topics.domain": "mill", "readings.fields": ["b", "c"]}, "x")
    assert after.windows.hop_ms == 300_000
    assert after.kafka.group_id == "mine"
    assert after.readings.targets == ("b",)


def test_no_season_that_was_asked_for_stays_none_where_none_is_the_default_too() -> None:
    """A day has no season of 24 hours: what was set to none looks like what follows from the window."""
    none = parse('[windows]\nsize="1d"\n[forecast]\nseason=[]')
    for values in ({"forecast.horizon": 3}, {"windows.size": "1h"}):
        assert changed(none, values, "the data").forecast.season_ms == ()
    follows = parse('[windows]\nsize="1d"')
    assert changed(follows, {"windows.size": "1h"}, "the data").forecast.season_ms == (86_400_000,)


@pytest.mark.parametrize("profile", ["base", "lean", "accuracy"])
def test_each_profile_is_there(profile: str) -> None:
    assert parse(f'[forecast]\nprofile = "{profile}"').forecast.profile == profile


def test_what_was_set_otherwise_twice_says_who_did_it_last() -> None:
    first = changed(parse(""), {"forecast.horizon": 3, "windows.size": "15m"}, "the data")
    after = changed(first, {"forecast.horizon": 5}, "the model")
    assert (after.forecast.horizon, after.windows.size_ms) == (5, 900_000)
    assert (after.source_of("forecast.horizon"), after.source_of("windows.size")) == ("the model", "the data")


def test_secrets_go_along_and_are_shown_nowhere() -> None:
    after = changed(parse(SECURE), {"forecast.horizon": 3}, "the data")
    assert after.kafka == parse(SECURE).kafka
    assert after.kafka.sasl_plain_password == "s3cret"
    assert "s3cret" not in repr(after)
    assert "s3cret" not in str(describe(after))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"windows.size": "4 parsecs"}, ['windows.size = "4 parsecs" (the data)', "a duration such as"]),
        ({"forecast.season": ["90m"]}, ['forecast.season = ["90m"] (the data)', "windows.hop"]),
        ({"forecast.horizon": 0}, ["forecast.horizon = 0 (the data)", "at least 1"]),
        ({"scoring.leads": [25]}, ["scoring.leads = [25] (the data)", "forecast.horizon = 24"]),
    ],
)
def test_what_is_wrong_with_what_was_set_otherwise_is_named_with_who_set_it(values, words) -> None:
    with pytest.raises(SettingsError) as caught:
        changed(parse(""), values, "the data")
    for word in words:
        assert word in str(caught.value)


# -- as a file


@pytest.mark.parametrize("toml", ["", TEN_LINES, ALL_SORTS])
def test_settings_written_as_a_file_are_read_back_as_they_were(toml: str) -> None:
    settings = parse(toml, environ=ENVIRON if toml == ALL_SORTS else {})
    again = parse(to_toml(settings))
    assert without_sources(again) == msgspec.structs.replace(settings, sources={}, topics=again.topics)
    for name in ("readings", "forecasts", "dead_letters", "state", "models", "control", "scores"):
        assert getattr(again.topics, f"{name}_topic") == getattr(settings.topics, f"{name}_topic")
    assert to_toml(again) == to_toml(settings)
    assert to_toml(changed(settings, {}, "nobody")) == to_toml(settings)


def test_a_file_says_every_key_once_under_its_section() -> None:
    import tomllib

    sections = tomllib.loads(to_toml(parse(ALL_SORTS)))
    assert list(sections) == list(SECTIONS)
    for name, kind in SECTIONS.items():
        assert list(sections[name]) == [info.encode_name for info in msgspec.structs.fields(kind)]


def test_a_file_leaves_secrets_out_and_says_so_and_takes_them_from_the_environment() -> None:
    settings = parse(SECURE)
    text = to_toml(settings)
    assert "s3cret" not in text
    assert "****" not in text
    assert "# sasl_plain_password: a secret, left out" in text
    assert "# ssl_password: a secret, left out" in text
    assert 'sasl_plain_username = "mill"' in text
    secrets = {"MILLRACE_KAFKA__SASL_PLAIN_PASSWORD": "s3cret", "MILLRACE_KAFKA__SSL_PASSWORD": "s3cret"}
    assert parse(text, environ=secrets).kafka == settings.kafka
    with pytest.raises(SettingsError, match=r"kafka\.sasl_plain_password"):
        parse(text)


@given(st.integers(0, 10**12))
def test_a_duration_survives_being_written_and_read(milliseconds):
    assert parse_duration(format_duration(milliseconds)) == milliseconds


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1 hour", "1h 30", "0.0001ms", "1,5h", "inf s", "1e3s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"duration|whole number"):
        parse_duration(text)


def test_the_page_of_settings_is_up_to_date():
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    assert page == reference(), "run: python -m pipeline._settings_reference > docs/settings.md"


@pytest.mark.parametrize("key", ["fields", "event_time", "sensor"])
def test_a_field_name_that_the_decoder_cannot_hold_is_refused(key: str) -> None:
    value = """["a\\"b"]""" if key == "fields" else """"a\\"b\""""
    with pytest.raises(SettingsError, match=rf"readings\.{key} .*quotation marks"):
        parse(f"[readings]\n{key} = {value}\n")


def test_changing_settings_that_were_built_in_python_keeps_what_they_say() -> None:
    built = parse("", environ={}, overrides={"windows.size": "5m"})
    bare = msgspec.structs.replace(built, sources={})
    other = changed(bare, {"forecast.horizon": 3}, "a test")
    assert (other.windows.size_ms, other.windows.hop_ms, other.forecast.horizon) == (300_000, 300_000, 3)


def test_what_follows_from_a_key_follows_it_when_it_changes() -> None:
    settings = parse('[readings]\nfields = ["a"]\ntargets = []\n[windows]\nhop = ""\n', environ={})
    other = changed(settings, {"readings.fields": ["b"], "windows.size": "5m"}, "a test")
    assert (other.readings.targets, other.windows.hop_ms) == (("b",), 300_000)


def test_changing_a_key_that_there_is_not_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"windows.sise: no such setting"):
        changed(parse("", environ={}), {"windows.sise": "5m"}, "a test")
