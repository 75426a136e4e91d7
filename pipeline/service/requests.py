"""What people ask of the trainer, over the control topic."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeline.kafka.lineage import utc_now
from pipeline.kafka.sink import RecordSink
from pipeline.settings import Settings
from pipeline.stream.columns import OutgoingRecords

PARTITION = 0
"""The control topic's only one: whoever of the trainers has it is on duty."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the control topic."""

    request: Literal["retrain"]
    reason: str = ""
    requested_at: str = ""
    """ISO 8601, UTC."""


def ask_to_retrain(settings: Settings, reason: str) -> None:
    """Returns when the request is on the control topic; whichever trainer is on duty, or the next one to come, takes it up.
    Raises DeploymentError."""
    request = Request(request="retrain", reason=reason, requested_at=utc_now())
    with RecordSink(settings) as sink:
        sink.deliver(
            [OutgoingRecords(settings.topics.control_topic, PARTITION, [b"retrain"], [msgspec.json.encode(request)])]
        )


def read_request(value: bytes | None) -> Request:
    """Raises msgspec.MsgspecError for what is no request."""
    return msgspec.json.decode(value or b"", type=Request)
