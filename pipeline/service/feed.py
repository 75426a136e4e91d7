"""Champions as they are named on the models topic, loaded, compiled and warmed in the background, ready to take over.

    models topic ──> thread: fetch, verify, load, compile ──> take() ──> the worker, between two rounds

A champion that cannot be loaded leaves the one before in service; the log says what is wrong with it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from pathlib import Path

from models.artifact import MANIFEST_FILE, MODEL_FILE, ArtifactError, load
from models.forecaster import Model, SeriesSpec
from models.rnn import ROW_BUCKETS
from models.training import network_of
from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.registry import RegistryReader
from pipeline.service.assembly import task_settings
from pipeline.service.metrics import WorkerMetrics
from pipeline.service.serving import require_small_rows
from pipeline.settings import Settings

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 500
RETRY_SECONDS = 5.0


class ModelFeed:
    """Follows the models topic. `first` before `start`; `take` from the worker's thread."""

    def __init__(self, settings: Settings, spec: SeriesSpec, metrics: WorkerMetrics | None = None) -> None:
        self._settings = settings
        self._spec = spec
        self._metrics = metrics
        self._reader = RegistryReader(settings)
        self._ready: Model | None = None
        self._newest: Model | None = None
        self._tried = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="millrace: models", daemon=True)

    def first(self) -> Model | None:
        """The champion as it is now; None while there is none. Raises DeploymentError where it cannot be served."""
        self._reader.catch_up()
        champion = self._reader.view.champion
        if champion is None:
            return None
        self._tried = champion.version
        self._newest = load_version(self._reader, champion.version, self._spec)
        return self._newest

    def start(self) -> None:
        self._thread.start()

    def take(self) -> Model | None:
        """The newest champion that is ready and has not been taken yet."""
        with self._lock:
            ready, self._ready = self._ready, None
            return ready

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._reader.poll(POLL_TIMEOUT_MS)
                self._look()
            except BrokerUnavailable as error:
                log.info("models: %s; trying again", error)
                self._stop.wait(RETRY_SECONDS)
            except Exception:
                log.exception("models: a new champion could not be prepared; the one before goes on serving")
                self._stop.wait(RETRY_SECONDS)

    def _look(self) -> None:
        champion = self._reader.view.champion
        if champion is None or champion.version == self._tried:
            return
        try:
            model = load_version(self._reader, champion.version, self._spec)
            require_small_rows(task_settings(self._settings), model, self._settings.readings.max_sensor_bytes)
            self._warm_up(model)
        except BrokerUnavailable:
            raise
        except DeploymentError as error:
            self._tried = champion.version
            log.error("model %s cannot serve, the one before goes on: %s", champion.version, error)
            if self._metrics:
                self._metrics.load_failures.inc()
            return
        self._tried = champion.version
        with self._lock:
            self._ready = self._newest = model
        log.info("model %s is ready", champion.version)

    def _warm_up(self, model: Model) -> None:
        """Compile what the service has called so far, and what taking over calls."""
        network, before = network_of(model), network_of(self._newest)
        assert network is not None
        if before is not None:
            network.net.warm_up_like(before.net)
        network.net.warm_up_carry(ROW_BUCKETS, self._settings.model.rewarm_steps)


def load_version(reader: RegistryReader, version: str, spec: SeriesSpec) -> Model:
    """A version of the registry, verified. Raises DeploymentError: its bytes are missing or altered, or it was made for another
    series than `spec` (whose horizon and quantiles do not matter)."""
    manifest = reader.view.resolve(version).manifest
    body = reader.fetch(version)
    with tempfile.TemporaryDirectory(prefix="millrace-model-") as name:
        folder = Path(name)
        (folder / MODEL_FILE).write_bytes(body)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        try:
            model = load(folder, expect=spec, brought=True)
        except ArtifactError as error:
            raise DeploymentError(
                f"model {version}: {error.found}; expected {error.expected}; put another into service (`millrace models "
                "promote VERSION`), or set the settings back"
            ) from error
    for key in ("horizon", "quantiles"):
        if getattr(model.spec, key) != getattr(spec, key):
            log.warning(
                "model %s forecasts with %s = %s, the settings say %s: that comes with the next training",
                version, key, getattr(model.spec, key), getattr(spec, key),
            )  # fmt: skip
    return model
