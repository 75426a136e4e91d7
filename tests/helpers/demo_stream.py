"""A simulated stream run through the core without a broker: what a topic of readings and one of forecasts would hold."""

from collections.abc import Sequence

import numpy as np

from pipeline.service.ledger import Ledger
from pipeline.service.simulator import Fleet, SimulatedBatch
from pipeline.stream.columns import OutgoingRecords, RecordColumns
from pipeline.stream.serdes import encode_dead_letters, encode_forecasts
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings


def records_of(batch: SimulatedBatch, rows: np.ndarray, partition: int = 0, first_offset: int = 0) -> RecordColumns:
    """Some messages of a batch as one partition's records."""
    return RecordColumns.build(
        "demo.readings.v1",
        partition,
        (
            (first_offset + i, int(batch.timestamps_ms[row]), batch.keys[row], batch.values[row], ())
            for i, row in enumerate(rows.tolist())
        ),
    )


def answers_of(settings: TaskSettings, records: RecordColumns) -> tuple[TaskOutput, RecordColumns, RecordColumns]:
    """What the task says, and its forecasts and dead letters as records."""
    output = ForecastTask(settings).run(records)
    spec, partition = settings.spec, records.partition
    forecasts = encode_forecasts(output.forecasts, spec.target_names, spec.quantiles, spec.step_ms, "f")
    letters = encode_dead_letters(output.dead_letters, "d", partition)
    return output, as_records(forecasts), as_records(letters)


def as_records(sent: OutgoingRecords) -> RecordColumns:
    headers: Sequence = sent.headers or [()] * len(sent)
    return RecordColumns.build(
        sent.topic,
        sent.partition,
        ((i, -1, key, value, head) for i, (key, value, head) in enumerate(zip(sent.keys, sent.values, headers))),
    )


def ledger_of(settings: TaskSettings, fleet: Fleet, batch: SimulatedBatch, partition: np.ndarray) -> Ledger:
    ledger = Ledger(settings.rule, len(fleet))
    ledger.add(batch, partition.astype(np.int32))
    return ledger
