import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pipeline.errors import DeploymentError
from pipeline.service.metrics import WorkerMetrics, expose
from tests.helpers.ports import free_port


def test_what_is_known_beforehand_is_there_from_the_start():
    text = generate_latest(WorkerMetrics(CollectorRegistry()).registry).decode()
    for line in (
        'millrace_transactions_total{result="committed"} 0.0',
        'millrace_transactions_total{result="failed"} 0.0',
        'millrace_partitions{phase="serving"} 0.0',
        "millrace_restored_sensors_total 0.0",
    ):
        assert line in text


def test_the_series_of_a_partition_ends_when_it_goes():
    metrics = WorkerMetrics(CollectorRegistry())
    metrics.checkpoint_time.labels("3").set(1.0)
    metrics.forget_partition(3)
    metrics.forget_partition(4)
    assert b'partition="3"' not in generate_latest(metrics.registry)


def test_metrics_are_served_while_the_context_lasts():
    port = free_port()
    with expose("127.0.0.1", port) as registry:
        WorkerMetrics(registry).checkpoints.inc(3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"millrace_checkpoints_total 3.0" in answer.read()
        with pytest.raises(DeploymentError, match=rf"127\.0\.0\.1:{port}.*http\.port"), expose("127.0.0.1", port):
            pass
    with expose("127.0.0.1", port), expose("127.0.0.1", 0):
        pass
