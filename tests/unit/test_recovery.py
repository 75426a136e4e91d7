"""Where a partition begins, and what stops a worker: a table of what group, log and changelog may say."""

from dataclasses import replace

import pytest

from pipeline.errors import DeploymentError
from pipeline.service.recovery import Found, plan_start
from pipeline.stream.checkpoint import LAYOUT, Manifest


def manifest(offset=50, model="gru64-a", sensors=3, group="g"):
    return Manifest(LAYOUT, offset, group, model, sensors, 256, (), (), {})


FOUND = Found(
    topic="plant.readings.v1",
    partition=3,
    group="g",
    beginning=0,
    end=100,
    committed=60,
    manifest=manifest(),
    model="gru64-a",
    models_topic="plant.models.v1",
)


@pytest.mark.parametrize(
    ("change", "restore", "offset", "emit_from"),
    [
        ({}, True, 50, 60),
        ({"committed": 50}, True, 50, 50),
        ({"beginning": 50}, True, 50, 60),
        ({"end": 60}, True, 50, 60),
        # the first start of all: everything that is there is answered
        ({"committed": None, "manifest": None}, False, 0, 0),
        ({"committed": None, "manifest": None, "beginning": 7}, False, 7, 7),
        # states of an older version, which kept none: the whole log is there
        ({"manifest": None}, False, 0, 60),
        # a model where there was none, another one: it takes over where answers begin
        ({"manifest": manifest(model="")}, True, 50, 60),
        ({"manifest": manifest(model="gru64-b")}, True, 50, 60),
        # what `state reset` leaves: an empty checkpoint at the log's beginning, of no model
        ({"manifest": manifest(offset=20, model="", sensors=0), "beginning": 20}, True, 20, 60),
        ({"manifest": manifest(offset=20, model="gone", sensors=0), "beginning": 20, "model": ""}, True, 20, 60),
        ({"manifest": manifest(model=""), "model": ""}, True, 50, 60),
    ],
)
def test_a_partition_begins(change, restore, offset, emit_from):
    start = plan_start(replace(FOUND, **change))
    assert (start.restore, start.offset, start.emit_from) == (restore, offset, emit_from)


@pytest.mark.parametrize(
    ("change", "says", "mend"),
    [
        ({"beginning": 61}, r"committed offset 60, the log holds \[61, 100\)", "--to beginning"),
        ({"end": 59}, r"committed offset 60, the log holds \[0, 59\)", "--to end"),
        ({"beginning": 51}, r"checkpoint stands at offset 50, the log holds \[51, 100\)", "readings_retention"),
        (
            {"manifest": None, "beginning": 1},
            "no checkpoint, and readings before 1 are gone",
            "restore the state topic",
        ),
        ({"manifest": None, "beginning": 60}, "no checkpoint, and readings before 60 are gone", "millrace state reset"),
        (
            {"model": ""},
            'model gru64-a, and topic "plant.models.v1" names no champion',
            "models import FOLDER --promote",
        ),
        (
            {"beginning": 55, "manifest": manifest(model="gru64-b")},
            r"at offset 50, the log holds \[55, 100\)",
            "state reset",
        ),
        ({"manifest": manifest(group="other")}, 'states of group "other"', "topics.state"),
        ({"committed": None}, "no committed offset, but a checkpoint at 50", "--to checkpoint"),
        ({"committed": 49}, "set the group back", "millrace state reset"),
    ],
)
def test_what_cannot_be_gone_on_from_stops_with_its_mend(change, says, mend):
    with pytest.raises(DeploymentError, match=f"(?s)plant.readings.v1.*partition 3.*{says}.*{mend}"):
        plan_start(replace(FOUND, **change))


def test_a_champion_that_is_not_the_states_own_is_told_in_the_log():
    assert plan_start(FOUND).note == ""
    start = plan_start(replace(FOUND, manifest=manifest(model="gru64-b")))
    assert start.note == "the states were made with model gru64-b: from offset 60 on gru64-a answers"
