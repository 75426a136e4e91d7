"""What stands around the network in the profiles `lean` and `accuracy`: stages that learn while they run.

    Context ──Volatility, SeasonalAverage──> lag features ──> pooled ridge ──> own ridge ──> network on what is left over
                                                                  │                │                 │
       last value, season ────────────────────────────────────────┴────────────────┴─────────────────┴──> mixture ──> quantiles

Each is an expert of its own. All but the network learn online, from labels that have matured, at epoch boundaries on the grid of steps;
they need no training, and answer alone until there is a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.features import Context, Ground, carried_forward, lead_knots, look_back, moved_left, season_phase
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from models.lags import CLIP_VOLATILITIES, CONSTANT, LagPlan, Stretch, damping, full_plan, lag_features, small_plan
from models.mixture import Calibration, Distances, Mixture, SaidBefore
from models.regression import LABELS, OwnRidge, PooledRidge
from models.rnn import RNNForecaster
from models.scaling import RunningScale
from models.seasonal_average import SeasonalAverage
from models.stages import Float32, Lesson, Shared, Stage, View
from models.volatility import Volatility

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]

EPOCH_STEPS: Final = 24
"""Between two lessons."""
OWN_KNOTS: Final = 4
FULL_KNOTS: Final = 8
NEVER: Final = -(2**62)
ONLINE: Final = "online"
"""Version of a cascade without a network."""
PENDING, END_MS, EPOCH = "cascade.pending", "cascade.end_ms", "cascade.epoch"
LESSON_ROWS: Final = 1024
"""Sensors that have a lesson at a time."""
LAST, SEASON = "last", "season"
INPUT_CLIP = 8.0
BASE_LIMIT = 100.0
"""Of what the network is to correct, in its unit."""
TINY = 1e-30
ANOTHER_ORDER = 200.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What a cascade sees at some steps; N = B * K series."""

    view: View
    anchor: Float64
    """(N, T) the last value known, as a distance from `memory.origin`; NaN = none."""
    unit: Float64
    """(N, T)"""
    fast: Float64
    """(N, T) what the network counts in."""


class Cascade:
    """A forecaster of the profiles `lean` and `accuracy`. network: None until one was trained."""

    name = "Millrace"

    warmup_steps = 0
    """The mixture knows whom to believe of a series that is new; the network keeps quiet until its own warm-up is over."""

    def __init__(self, spec: SeriesSpec, network: RNNForecaster | None = None, prior: Shared | None = None) -> None:
        """prior: partition columns as a training over all partitions left them."""
        self.spec = spec
        self.network = network
        self.prior = prior
        self.version = network.version if network else ONLINE
        self.epoch_steps = epoch_steps(spec.horizon)
        targets, horizon = len(spec.targets), spec.horizon
        self._plans = full_plan(spec), small_plan(spec)
        self.stages = _stages(spec, self._plans, self.epoch_steps)
        names = [LAST, *([SEASON] if spec.seasons else []), *(stage.name for stage in self.stages)]
        self._names = names
        self._corrected = [stage.name for stage in self.stages if isinstance(stage, OwnRidge)]
        """Stages that the network corrects: the first is what it was trained over."""
        corrected = [names.index(name) for name in self._corrected]
        experts = [*names, *(f"network over {name}" for name in self._corrected)]
        baseline = names.index(SEASON if spec.seasons else LAST)
        self.mixture = Mixture(experts, [*range(len(names)), *corrected], baseline, look_back(spec), horizon, targets)
        self._calibrations = tuple(
            Calibration(f"calibration.{spread}_", spec.quantiles, horizon, targets) for spread in ("error", "network")
        )
        """Of spreads that past errors tell, and of those that a network says."""
        self.said = SaidBefore(horizon, targets, len(experts) + len(self.calibration.tracked), self.epoch_steps)
        self.volatility = Volatility(spec)
        self._scaling = RunningScale(len(spec.channels))
        reach = max(plan.reach for plan in self._plans)
        self.ring_steps = reach + horizon + self.epoch_steps
        """What it asks `SeriesMemory` to remember."""
        self.average = SeasonalAverage(spec, self.ring_steps)
        self._begin = max((last for _, last in self._plans[0].averages), default=8)
        """Steps of a sensor before it is learned from."""

    @staticmethod
    def of(spec: SeriesSpec) -> Cascade | None:
        """Without a network; None in profile `base`."""
        return None if spec.profile == "base" else Cascade(spec)

    @property
    def calibration(self) -> Calibration:
        return self._calibrations[0 if self.network is None else 1]

    # -- state

    def columns(self) -> tuple[Column, ...]:
        return (*self.online_columns(), *self.network_columns())

    def network_columns(self) -> tuple[Column, ...]:
        """Those that another network begins anew."""
        return self.network.columns() if self.network else ()

    def online_columns(self) -> tuple[Column, ...]:
        """Those that another network leaves as they are."""
        return (
            Column(PENDING, (), np.dtype(np.int32)),
            Column(END_MS, (), np.dtype(np.int64)),
            *self.volatility.columns(),
            *self.average.columns(),
            *(column for stage in self.stages for column in stage.columns()),
            *self.said.columns(),
            *self.mixture.columns(),
            *(column for calibration in self._calibrations for column in calibration.columns()),
        )

    def partition_columns(self) -> tuple[Column, ...]:
        return (
            Column(EPOCH, (), np.dtype(np.int64), fill=NEVER),
            *(column for stage in self.stages for column in stage.partition_columns()),
            *self.mixture.partition_columns(),
            *(column for calibration in self._calibrations for column in calibration.partition_columns()),
        )

    def begin(self, shared: Shared) -> None:
        """A partition that has learned nothing yet begins with what training knew."""
        if self.prior is not None and not shared[LABELS].any():
            for name, value in self.prior.items():
                shared[name][...] = value

    # -- forecasting

    def advance(self, rows: Rows, block: StepBlock, context: Context) -> Prediction:
        sight = self._consume(rows, block, context)
        said = self._online(rows, context.shared, sight.view)
        if self.spec.seasons:
            said[SEASON] = self._season(context, sight)
        ground = self._ground(context, sight, said)
        batch, steps = context.shape
        shape = (batch, len(self.spec.targets), steps, self.spec.horizon)
        experts = [said[name].reshape(shape) for name in self._names]
        losses = self.mixture.losses(rows, context.shared)
        if self.network is None:
            experts += [np.full(shape, np.nan, np.float32) for _ in self._corrected]
            spread = self.calibration.gaussian(losses)
        else:
            mean, quantiles = self.network.offsets(rows, block, context.on(ground))
            scale = (sight.fast / sight.unit).astype(np.float32).reshape(*shape[:3], 1)
            awake = (context.steps >= self.network.warmup_steps)[:, None, :, None]
            correction = mean.transpose(0, 3, 1, 2) * scale
            if not awake.all():
                correction = np.where(awake, correction, np.float32(np.nan))
            experts += [said[name].reshape(shape) + correction for name in self._corrected]
            spread = self.calibration.distances(quantiles.transpose(0, 3, 1, 2, 4)) * scale[..., None]
            if not (awake.all() and np.isfinite(spread.sum())):
                spread = np.where(awake[..., None] & np.isfinite(spread), spread, self.calibration.gaussian(losses))
        point = self.mixture.mixed(experts, self.mixture.weights(losses))
        answer = point[..., None] + self.calibration.offsets(rows, context.shared, spread)
        self._keep(rows, block, context, experts, answer)
        if self.network is None and not context.shared[LABELS].any():
            answer = np.full_like(answer, np.nan)  # nobody has learned anything yet
        anchor = sight.anchor.reshape(*shape[:3]) + context.origin[:, list(self.spec.targets), None]
        unit = sight.unit.reshape(*shape[:3])
        anchor, unit = anchor.astype(np.float32), unit.astype(np.float32)
        point *= unit[..., None]
        point += anchor[..., None]
        answer *= unit[..., None, None]
        answer += anchor[..., None, None]
        return Prediction(
            np.ascontiguousarray(point.transpose(0, 2, 3, 1)),
            np.ascontiguousarray(answer.transpose(0, 2, 3, 1, 4)),
            ground,
        )

    def rebuild(self, rows: Rows, block: StepBlock, context: Context) -> None:
        """The network's hidden state, from the ground as it would be laid today."""
        if self.network is None:
            return
        slow, fast = self.volatility.now(rows, context.scale[:, 0])
        steps = context.shape[1]
        units = [np.repeat(part.reshape(-1, 1), steps, axis=1) for part in (slow, fast)]
        average = np.empty((len(units[0]), steps))
        if self.spec.seasons:
            ring = rows["average.ring"]
            average = _series(moved_left(ring, steps - block.live.sum(axis=1)))
        sight = self._sight(context, average, *units)
        said = self._online(rows, context.shared, sight.view)
        self.network.rebuild(rows, block, context.on(self._ground(context, sight, said)))

    def _consume(self, rows: Rows, block: StepBlock, context: Context) -> Sight:
        """What the block's steps leave in the rows, and what is seen at each of them."""
        slow, fast = self.volatility.advance(rows, context)
        average = self.average.advance(rows, context, CLIP_VOLATILITIES * fast, block.live)
        consumed = block.live.sum(axis=1)
        rows[PENDING] += consumed.astype(np.int32)
        end_ms = np.where(block.live, block.end_ms, NEVER).max(axis=1)
        rows[END_MS][:] = np.where(consumed > 0, end_ms, rows[END_MS])
        return self._sight(
            context, _series(average), *(part.transpose(0, 2, 1).reshape(-1, part.shape[1]) for part in (slow, fast))
        )

    def _sight(self, context: Context, average: Float64, unit: Float64, fast: Float64) -> Sight:
        """unit, fast: (N, T)"""
        steps, targets = context.shape[1], list(self.spec.targets)
        anchor = (context.last - context.origin[:, None, targets]).transpose(0, 2, 1).reshape(-1, steps)
        phase = np.repeat(season_phase(self.spec, context.end_ms), len(targets), axis=0)
        history = _series(context.history[..., targets])
        unit, fast = np.maximum(unit, TINY), np.maximum(fast, TINY)
        return self._look(Stretch(history, average, steps, anchor, fast, unit, phase))

    def _look(self, stretch: Stretch) -> Sight:
        full, small = lag_features(self._plans, stretch)
        return Sight(View(full, small, len(self.spec.targets)), stretch.anchor, stretch.unit, stretch.limit)

    def _online(self, rows: Rows, shared: Shared, view: View) -> dict[str, Float32]:
        """(N, T, H) what each stage says."""
        series, steps = view.full.shape[:2]
        said = {"": np.zeros((series, steps, self.spec.horizon), np.float32)}
        for stage in self.stages:
            said[stage.name] = said[stage.over] + stage.forecast(rows, shared, view)
        said[LAST] = said[""]
        return said

    def _season(self, context: Context, sight: Sight) -> Float32:
        """(N, T, H)"""
        distance = (context.season_values() - context.last[:, :, None, :]).transpose(0, 3, 1, 2)
        found = distance.reshape(*sight.unit.shape, -1) / sight.unit[..., None]
        far = (CLIP_VOLATILITIES * sight.fast / sight.unit)[..., None]
        found = np.clip(found, -far, far)  # a spike of a season ago is no forecast
        return np.nan_to_num(found, nan=0.0).astype(np.float32)

    def _ground(self, context: Context, sight: Sight, said: dict[str, Float32]) -> Ground:
        """What the network starts from."""
        batch, steps = context.shape
        targets = len(self.spec.targets)
        stretch = (sight.unit / sight.fast).astype(np.float32)[..., None]
        base = np.clip(said[self._corrected[0]] * stretch, -BASE_LIMIT, BASE_LIMIT)
        at = np.array(lead_knots(self.spec.horizon)) - 1
        features = sight.view.full[..., CONSTANT + 1 : sight.view.full.shape[-1] - self._calendar] * stretch
        own = [
            np.clip(features, -INPUT_CLIP, INPUT_CLIP),
            np.clip(base[..., at], -INPUT_CLIP, INPUT_CLIP),
            np.log(stretch),
        ]
        inputs = np.concatenate(own, axis=2).reshape(batch, targets, steps, -1).transpose(0, 2, 1, 3)
        return Ground(
            base.reshape(batch, targets, steps, -1).transpose(0, 2, 3, 1),
            sight.fast.reshape(batch, targets, steps).transpose(0, 2, 1),
            np.ascontiguousarray(inputs.reshape(batch, steps, -1)),
        )

    def _keep(self, rows: Rows, block: StepBlock, context: Context, experts: list[Float32], answer: Float32) -> None:
        at = self.said.leads - 1
        known = [expert[..., at] for expert in experts] + [answer[..., at, q] for q in self.calibration.tracked]
        said = np.stack(known, axis=-1).transpose(0, 2, 1, 3, 4)
        self.said.keep(rows, context.steps, block.live, said)

    # -- learning

    def teach(self, epoch: int, columns: Rows, shared: Shared) -> NDArray[np.int32]:
        """Where another epoch begins, a lesson for all sensors that have consumed steps since the last one; returns which. columns: the
        whole state, (sensors, ...) each, changed in place: those of `SeriesMemory` and its own."""
        if epoch == int(shared[EPOCH]):
            return np.empty(0, np.int32)
        shared[EPOCH][...] = epoch
        waiting = np.flatnonzero(columns[PENDING] > 0).astype(np.int32)
        own = [column.name for column in (*self.online_columns(), *self._scaling.columns())]
        for first in range(0, len(waiting), LESSON_ROWS):
            sensors = waiting[first : first + LESSON_ROWS]
            rows = {name: column[sensors] for name, column in columns.items()}
            self._begin_anew(rows)
            self.learn(rows, shared)
            for name in own:
                columns[name][sensors] = rows[name]
        if len(waiting):
            self.settle(columns, shared)
        return waiting

    def _begin_anew(self, rows: Rows) -> None:
        """A sensor whose moves have become of another order of magnitude, up or down, and stay so (another unit, another range): what was
        learned of it, its scale included, is forgotten. Half of a season's moves tell it upwards, two thirds downwards: no spike does, and
        no burst of what is mostly still."""
        ring = rows["memory.ring"][..., list(self.spec.targets)].astype(np.float64)
        season = look_back(self.spec)
        moves = np.abs(ring[:, -season:] - ring[:, -season - self.volatility.lag : -self.volatility.lag])
        known = np.asarray(np.isfinite(moves).all(axis=1))
        moves = np.sort(np.where(known[:, None], moves, 0.0), axis=1)
        half, most = np.median(moves, axis=1), moves[:, 2 * season // 3]
        slow = np.sqrt(rows["volatility.square"][..., 0])
        unit = np.maximum(slow, self._units(rows)[0].reshape(slow.shape))
        other = known & (slow > 0) & ((half > ANOTHER_ORDER * slow) | ((most > 0) & (most < unit / ANOTHER_ORDER)))
        alien = other.any(axis=1) & (rows["volatility.count"].min(axis=1) > 2 * season)
        if not alien.any():
            return
        for column in (*self.online_columns(), *self._scaling.columns()):
            if column.name not in (PENDING, END_MS):
                rows[column.name][alien] = column.fill
        rows[PENDING][alien] = 0

    def learn(self, rows: Rows, shared: Shared) -> None:
        """A lesson for some sensors, from what has matured since their last one. Sensors without news may be left out."""
        pending = rows[PENDING].astype(np.int64)
        self._learn_stages(rows, shared, pending)
        self._learn_who_is_right(rows, shared, pending)
        rows[PENDING][:] = 0

    def settle(self, rows: Rows, shared: Shared) -> None:
        """All sensors had their lesson. rows: the columns of them all."""
        for stage in self.stages:
            stage.settle(shared)
        self.mixture.settle(rows, shared)
        self.calibration.settle(rows, shared)

    def _learn_stages(self, rows: Rows, shared: Shared, pending: Int64) -> None:
        pairs, horizon = self.epoch_steps, self.spec.horizon
        targets = list(self.spec.targets)
        ring = rows["memory.ring"][..., targets].astype(np.float64)
        anchors = _series(self._anchors(ring))
        history = _series(ring)
        size = history.shape[1]
        first = pairs + horizon
        origins = slice(size - first, size - horizon)
        slow, fast = (np.maximum(part, TINY) for part in self._units(rows))
        back = horizon + pairs - 1 - np.arange(pairs)
        """Steps from each origin to now."""
        phase = season_phase(self.spec, rows[END_MS][:, None] - back * self.spec.step_ms)
        stretch = Stretch(
            history,
            _series(rows["average.ring"].astype(np.float64)) if self.spec.seasons else np.empty((len(history), size)),
            first,
            anchors[:, origins],
            np.broadcast_to(fast[:, None], (len(history), pairs)),
            np.broadcast_to(slow[:, None], (len(history), pairs)),
            np.repeat(phase, len(targets), axis=0),
        )
        view = self._look(stretch).view
        followed = np.lib.stride_tricks.sliding_window_view(history[:, size - first + 1 :], horizon, axis=1)
        label = ((followed - stretch.anchor[..., None]) / slow[:, None, None]).astype(np.float32)
        # A pair is due if its last label came since the last lesson, its step stood on enough of a past, and the sensor is still the same.
        ordinal = rows["memory.steps"][:, None] - back
        begun = rows["volatility.count"].min(axis=1)[:, None] > back
        due = (back < (pending + horizon)[:, None]) & (ordinal > self._begin) & begun
        weight = np.repeat(due, len(targets), axis=0) * damping(view.full, stretch) ** 2
        moves = np.abs(view.full[..., CONSTANT + 1 : view.full.shape[-1] - self._calendar]).max(axis=2) > 0
        weight = np.where(
            np.isfinite(stretch.anchor) & (moves | (np.abs(np.nan_to_num(label)).max(axis=2) > 0)), weight, 0.0
        )
        lesson = Lesson(view, label, weight.astype(np.float32), np.repeat(pending, len(targets)))
        said = self._online(rows, shared, view)
        for stage in self.stages:
            stage.learn(rows, shared, lesson, said[stage.over], said[stage.name])

    def _learn_who_is_right(self, rows: Rows, shared: Shared, pending: Int64) -> None:
        ring = rows["memory.ring"][..., list(self.spec.targets)].astype(np.float64)
        batch, _, targets = ring.shape
        unit = np.maximum(self._units(rows)[0], TINY).reshape(batch, 1, targets)
        distances = Distances(ring / unit, self._anchors(ring) / unit)
        steps = rows["memory.steps"].astype(np.int64)
        self.mixture.forget(rows, pending)
        for number, stride in enumerate(self.said.stride.tolist()):
            matured = self.said.matured(rows, number, steps, pending, distances)
            self.mixture.learn(rows, shared, number, stride, matured)
            self.calibration.learn(rows, shared, number, stride, matured)

    def _units(self, rows: Rows) -> tuple[Float64, Float64]:
        """(N,) slow and fast volatility, as they stand."""
        _, scale = self._scaling.now(rows)
        slow, fast = self.volatility.now(rows, scale[:, list(self.spec.targets)])
        return slow.reshape(-1), fast.reshape(-1)

    def _anchors(self, ring: Float64) -> Float64:
        """(B, R, K) the value known last at each step of the ring, NaN before the first."""
        if not np.isnan(ring).any():
            return ring
        return carried_forward(np.full((len(ring), ring.shape[2]), np.nan), ring, np.isfinite(ring))

    @property
    def _calendar(self) -> int:
        return 2 * self._plans[0].harmonics * self._plans[0].seasons


def epoch_steps(horizon: int) -> int:
    """Steps between two lessons: short horizons profit from fresh labels, and have them."""
    return min(EPOCH_STEPS, max(4, horizon))


def _stages(spec: SeriesSpec, plans: tuple[LagPlan, LagPlan], epoch: int) -> tuple[Stage, ...]:
    full, small = plans
    targets, horizon = len(spec.targets), spec.horizon
    pooled = PooledRidge(full.size, horizon, targets, epoch)
    own = OwnRidge("own", small.size, horizon, targets, OWN_KNOTS, "small")
    if spec.profile == "lean":
        return pooled, own
    return pooled, own, OwnRidge("full", full.size, horizon, targets, FULL_KNOTS, "full")


def _series(values: NDArray[np.floating]) -> Float64:
    """(B, R, K) -> (N, R)"""
    batch, steps, targets = values.shape
    return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(batch * targets, steps).astype(np.float64)
