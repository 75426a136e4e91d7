"""Backtests put together: what is asked, from which data, with which model.

    from pipeline.service.backtest import backtest
    frame = backtest(df, train_until="2017-07-01", horizon=24)

`Passage` goes through the data, `Timeline` says who answers, `results` writes it down.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd

from models.artifact import ArtifactError, load, read_manifest, spec_from_dict
from models.forecaster import Model, SeriesSpec
from models.training import TrainingProgress
from pipeline.errors import DeploymentError, SettingsError
from pipeline.kafka.registry import RegistryReader
from pipeline.kafka.source import RecordSource
from pipeline.service.assembly import task_settings
from pipeline.service.feed import load_version
from pipeline.service.files import FileLayout
from pipeline.service.inputs import FileInput, Input, TopicInput
from pipeline.service.keeping import Folder, Keeper, Memory, planned, require_free
from pipeline.service.matching import FrameShape, Kept, Matching
from pipeline.service.outlook import prepared
from pipeline.service.passage import Outcome, Passage, Progress, baselines_of, frame_of
from pipeline.service.question import Place, Question, epoch_ms
from pipeline.service.statistical import Statistical
from pipeline.service.timeline import Fresh, Given, Recorded, Scheduled, Shelf, Timeline
from pipeline.service.words import moment
from pipeline.settings import Settings, changed, describe
from pipeline.settings import load as load_settings
from pipeline.stream.task import TaskSettings

NO_MODEL: Final = (
    "which model is to answer was not said: name one (--model DIR or VERSION), have one trained on what came before a time "
    "(--train-until T), or have the retraining rule replayed (--retrain-every 1d)"
)


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told what goes on."""

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Progress], None] = lambda at: None
    training: Callable[[TrainingProgress], None] | None = None


SILENT: Final = Watcher()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it."""

    settings: Settings
    outcome: Outcome
    notes: Sequence[str]
    forecasts: Path | None
    """forecasts.parquet; None: they are in `keeper`."""
    keeper: Keeper
    title: str

    def write(self, out: Path, sensors: Sequence[str] = ()) -> pd.DataFrame:
        """metrics.csv, settings.toml and report.html beside forecasts.parquet; returns the metrics. sensors: to be shown."""
        from pipeline.service.results import write_results

        assert self.forecasts is not None
        return write_results(
            out, self.forecasts, self.outcome, self.settings,
            title=f"Backtest of {self.title}", sensors=sensors, notes=self.notes,
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """All forecasts. Reads the file where they are in one."""
        if isinstance(self.keeper, Memory):
            return frame_of(self.keeper.tables, self.outcome.matching.shape.schema)
        assert self.forecasts is not None
        return pd.read_parquet(self.forecasts)


def backtest(
    df: pd.DataFrame,
    *,
    settings: Settings | None = None,
    time_column: str = "ds",
    id_column: str = "unique_id",
    value_columns: Sequence[str] = (),
    model: str | Path | None = None,
    train_until: Any = None,
    retrain_every: str = "",
    start: Any = None,
    end: Any = None,
    stride: int = 1,
    beside: Sequence[str] = (),
    out: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> pd.DataFrame:
    """The long frame (`pipeline.service.matching`) of what the service would have said of a DataFrame's readings.

    df: a row a reading with a sensor id (id_column), or, with id_column="", a row a time with a column a sensor (value_columns).
    model, train_until, retrain_every: as in `Question`, one of them. Times as pandas reads them, UTC without a zone.
    changes: horizon, quantiles, season, step: over what the settings say, and over what is estimated from the data.
    out: a folder for it, and for the report.

    Raises DeploymentError and SettingsError, which say what was expected."""
    keys = {"step": "windows.size", "season": "forecast.season"}
    overrides = {keys.get(name, f"forecast.{name}"): value for name, value in changes.items()}
    if isinstance(overrides.get("forecast.season"), str):
        overrides["forecast.season"] = [overrides["forecast.season"]]
    layout = FileLayout(time_column, tuple(value_columns) or (() if id_column else ("*",)), id_column)
    question = Question(
        model="" if model is None else str(model),
        train_until_ms=epoch_ms(train_until),
        retrain_every=retrain_every,
        start=epoch_ms(start),
        end=epoch_ms(end),
        stride=stride,
        beside=tuple(beside),
        out=out,
    )
    given = load_settings(None, {}, overrides) if settings is None else changed(settings, overrides, "the arguments")
    answer = of_file(given, [df], layout, question, Watcher(note=note))
    if out is not None:
        answer.write(out)
    return answer.frame()


def of_file(
    settings: Settings,
    sources: Sequence[Path | pd.DataFrame],
    layout: FileLayout,
    question: Question,
    watcher: Watcher = SILENT,
) -> Answer:
    """From files, one after the other, or DataFrames: as one partition. What the settings leave open is told from the data.

    Raises DeploymentError and SettingsError, which say what was expected."""
    end = question.end
    if not (isinstance(question.start, int | None) and isinstance(end, int | None)):
        raise SettingsError("offsets of partitions were given for a file: expected times, such as --from 2026-01-31")
    if question.recorded:
        raise SettingsError(
            "--recorded was given with --data: a file has no record of which model answered; leave it out"
        )
    _require_free(question)

    if not question.has_model and Path(settings.model.path).exists():
        question = replace(question, model=settings.model.path)
    spec = spec_of(question.model)
    data = prepared(_asked(settings, question), sources, layout, end, spec, watcher.note)
    core, from_ms = data.core, question.reads_from_ms(data.core)
    with _shelf(question) as shelf:
        timeline = _timeline(shelf, data.settings, core, question, watcher, None)

        def input_at(positions: Mapping[int, int]) -> Input:
            return FileInput(data.read(from_ms), core.format.fields, _title(sources), positions.get(0, 0))

        plan = {"data": [_identity(source) for source in sources], "layout": str(layout)}
        return _run(data.settings, core, input_at, timeline, question, plan, watcher, _title(sources))


def of_topic(settings: Settings, question: Question, watcher: Watcher = SILENT) -> Answer:
    """From the readings topic, committed records only, up to where it ends now.

    Raises DeploymentError and SettingsError, which say what was expected."""
    _require_free(question)
    if not question.has_model:
        question = replace(question, recorded=True)
    topic = settings.topics.readings_topic
    with ExitStack() as stack:
        registry: RegistryReader | None = None
        if question.recorded or (question.model and not Path(question.model).is_dir()):
            registry = stack.enter_context(RegistryReader(settings))
            registry.catch_up()
        settings = _asked(settings, question)
        core = task_settings(settings)
        source = stack.enter_context(RecordSource(settings, topic, group=False))
        before = planned(question.out) if question.out is not None and not question.overwrite else None
        starts = _offsets(source, question.start, core, question, "start")
        ends = _offsets(source, question.end, core, question, "end")
        if before is not None and "ends" in before:
            # It goes on to where it was to end, whatever retention has deleted since.
            starts, ends = ({int(p): offset for p, offset in before[which].items()} for which in ("starts", "ends"))
        shelf = stack.enter_context(_shelf(question))
        timeline = _timeline(shelf, settings, core, question, watcher, registry, starts)

        def input_at(positions: Mapping[int, int]) -> Input:
            return TopicInput(source, core.format, {**starts, **positions}, ends)

        plan = {
            "topic": topic,
            "starts": {str(p): offset for p, offset in starts.items()},
            "ends": {str(p): offset for p, offset in ends.items()},
        }
        return _run(settings, core, input_at, timeline, question, plan, watcher, topic)


def _run(
    settings: Settings,
    core: TaskSettings,
    input_at: Callable[[Mapping[int, int]], Input],
    timeline: Timeline,
    question: Question,
    plan: Mapping[str, Any],
    watcher: Watcher,
    title: str,
) -> Answer:
    kept = Kept(question.kept_from_ms, question.stride)
    matching = matching_for(core, timeline, kept, question.beside, question.history_steps)
    keeper: Keeper = Memory()
    positions: dict[int, int] = {}
    if question.out is not None:
        asked = {**question.facts(), "model": timeline.identity, **_shaping(settings)}
        keeper = Folder(question.out, matching.shape.schema, {**plan, **asked}, question.overwrite)
        if keeper.saved is not None:
            positions = {int(partition): offset for partition, offset in keeper.saved.facts["positions"].items()}
            watcher.note(f"going on with what is in {question.out}")
    passage = Passage(settings, input_at(positions), timeline, matching, keeper, watcher.progress)
    passage.resume()
    outcome = passage.run()
    notes = _notes(outcome, timeline.learned_to_ms, question.kept_from_ms)
    for note in notes:
        watcher.note(note)
    forecasts = keeper.finish() if isinstance(keeper, Folder) else None
    return Answer(settings, outcome, notes, forecasts, keeper, title)


def matching_for(
    core: TaskSettings, timeline: Timeline, kept: Kept, beside: Sequence[str] = (), history_steps: int = 0
) -> Matching:
    """With room for whatever the timeline's models may say. beside, history_steps: as in `Question`."""
    specs = [core.spec, *timeline.specs]
    season = core.spec.seasons[0] if core.spec.seasons else 1
    shape = FrameShape(
        targets=core.spec.target_names,
        horizon=max(spec.horizon for spec in specs),
        levels=tuple(sorted({level for spec in specs for level in spec.quantiles})),
        beside=tuple(kind.name for kind in baselines_of(core)),
        season=season,
        outside=tuple(beside),
    )
    outside = None
    if beside:
        steps = history_steps or 10 * max(season, shape.horizon)
        outside = Statistical(beside, season, shape.horizon, shape.levels, steps)
    return Matching(core.rule, shape, kept, outside)


# -- who answers


def _timeline(
    shelf: Shelf,
    settings: Settings,
    core: TaskSettings,
    question: Question,
    watcher: Watcher,
    registry: RegistryReader | None,
    starts: Mapping[int, int] | None = None,
) -> Timeline:
    if question.train_until_ms is not None:
        return Fresh(shelf, settings, core, question.train_until_ms, watcher.training)
    if question.retrain_every:
        return Scheduled(shelf, settings, core, watcher.training)
    if question.recorded:
        assert registry is not None
        if not registry.view.swaps:
            raise DeploymentError(
                f'topic "{registry.topic}" has no record of a model that answered, so there is no live run to repeat; {NO_MODEL}'
            )
        fetch = partial(_recorded_model, registry, core.spec, settings.retraining.keep_versions)
        return Recorded(shelf, registry.view.swaps, starts or {}, fetch)
    if not question.model:
        raise SettingsError(NO_MODEL)
    model, manifest = model_of(question.model, core.spec, registry)
    return Given(shelf, model, (manifest.get("data") or {}).get("to_ms"))


def _recorded_model(registry: RegistryReader, spec: SeriesSpec, keep_versions: int, version: str) -> Model:
    if version not in registry.view.versions:
        raise DeploymentError(
            f'{version} answered in this range, and topic "{registry.topic}" has it no more (retraining.keep_versions = {keep_versions}); '
            f"begin later (--from), or name a model (--model); to look back further from now on, keep more versions"
        )
    return load_version(registry, version, spec)


def model_of(name: str, spec: SeriesSpec, registry: RegistryReader | None) -> tuple[Model, Mapping[str, Any]]:
    """With its manifest."""
    if Path(name).is_dir() or registry is None:
        try:
            return load(Path(name), expect=spec, brought=True), read_manifest(Path(name))
        except ArtifactError as error:
            raise DeploymentError(str(error)) from error
    version = registry.view.resolve(name)
    return load_version(registry, version.version, spec), version.manifest


def spec_of(folder: str) -> SeriesSpec | None:
    """What the model in a folder was made for; None: it is no folder. Raises DeploymentError where the folder holds no model."""
    if not folder or not Path(folder).is_dir():
        return None
    try:
        return spec_from_dict(read_manifest(Path(folder))["spec"])
    except ArtifactError as error:
        raise DeploymentError(str(error)) from error


def _asked(settings: Settings, question: Question) -> Settings:
    if not question.retrain_every:
        return settings
    return changed(settings, {"retraining.every": question.retrain_every}, "--retrain-every")


@contextmanager
def _shelf(question: Question) -> Iterator[Shelf]:
    if question.out is not None:
        yield Shelf(question.out / "models")
        return
    with tempfile.TemporaryDirectory(prefix="millrace-backtest-") as folder:
        yield Shelf(Path(folder))


# -- which readings


def _offsets(source: RecordSource, place: Place, core: TaskSettings, question: Question, which: str) -> dict[int, int]:
    """The offset of each partition at which it starts or ends."""
    everything = source.partitions
    first, end = source.beginning_offsets(everything), source.end_offsets(everything)
    option = "--from" if which == "start" else "--to"
    if place is None:
        return first if which == "start" else end
    if isinstance(place, int):
        time_ms = question.reads_from_ms(core) if which == "start" else place
        return source.offsets_for_time(max(time_ms or 0, 0), everything)
    if strange := sorted(set(place) - set(everything)):
        raise SettingsError(f"{option} names partition {strange[0]}: topic {source.topic!r} has {everything}")
    found = (first if which == "start" else end) | dict(place)
    for partition, offset in found.items():
        if not first[partition] <= offset <= end[partition]:
            raise SettingsError(
                f"{option} {partition}:{offset}: the log of partition {partition} holds offsets {first[partition]} to "
                f"{end[partition]} (what is older was deleted by retention)"
            )
    return found


def _require_free(question: Question) -> None:
    if question.out is not None and not question.overwrite:
        require_free(question.out)


# -- what is remembered of the question


def _shaping(settings: Settings) -> dict[str, Any]:
    """The settings that shape what is said; who moves to another address goes on."""
    sections = ("readings", "windows", "forecast", "model", "training", "retraining", "scoring")
    rows = {row["key"]: row["value"] for row in describe(settings)}
    return {key: value for key, value in rows.items() if key.split(".")[0] in sections}


def _identity(source: Path | pd.DataFrame) -> str:
    if isinstance(source, pd.DataFrame):
        return f"DataFrame {source.shape} {int(pd.util.hash_pandas_object(source, index=False).sum())}"
    found = source.stat()
    return f"{source.name} {found.st_size} {found.st_mtime_ns}"


def _title(sources: Sequence[Path | pd.DataFrame]) -> str:
    return ", ".join("DataFrame" if isinstance(source, pd.DataFrame) else source.name for source in sources)


def _notes(outcome: Outcome, learned_to_ms: int | None, kept_from_ms: int | None) -> list[str]:
    """What whoever reads the figures should know."""
    counts = outcome.counts
    notes = [change.note for change in outcome.changes if change.note]
    if counts.late * 100 > counts.readings:
        notes.append(
            f"{counts.late / counts.readings:.1%} of the readings came after their windows had closed; a longer windows.grace "
            "waits for them"
        )
    begin_ms = outcome.first_ms if kept_from_ms is None else kept_from_ms
    if learned_to_ms is not None and begin_ms is not None and learned_to_ms > begin_ms:
        until = moment(learned_to_ms)
        notes.append(
            f"the model has learned from data up to {until} UTC: what is measured before that it may have seen; "
            f"--from {until.replace(' ', 'T')} measures only what it has not"
        )
    if not outcome.matching.forecasts:
        notes.append("no forecast was kept: the range ends before the first one")
    return notes
