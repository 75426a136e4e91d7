"""What is said of the Kafka client's errors."""

from __future__ import annotations

from kafka.errors import KafkaTimeoutError

from pipeline.kafka.clients import describe


def test_an_error_is_named_once_whether_or_not_its_text_begins_with_its_name():
    assert describe(KafkaTimeoutError("no answer")) == "KafkaTimeoutError: no answer"
    assert describe(KafkaTimeoutError()) == "KafkaTimeoutError"
    assert describe(ValueError("no answer")) == "ValueError: no answer"
