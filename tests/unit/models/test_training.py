import json
from dataclasses import replace

import numpy as np
import pytest

from models import artifact
from models.baselines import LastValue, SeasonalNaive
from models.evaluation import evaluate, training_deviation
from models.features import SeriesMemory
from models.forecaster import Prediction, SeriesSpec
from models.sequences import Futures, Sequences
from models.training import Examples, TrainingError, cut_pieces, figures, lane_chunks, train
from tests.helpers.series import SINGLE, SPEC, STEP_MS, Bench, noisy, seasonal_sequences

pytestmark = pytest.mark.keras
TINY = {"cell": "simple_rnn", "units": 4, "chunk_steps": 24, "lanes": 8, "warmup_steps": 6}
SMALL = {"units": 12, "chunk_steps": 24, "lanes": 8, "warmup_steps": 6, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def sequences():
    return seasonal_sequences(16)


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def trained(sequences, reports):
    return train(sequences, SINGLE, epochs=12, progress=reports.append, **SMALL)


@pytest.fixture(scope="module")
def scores(trained, sequences):
    return figures(trained, sequences, [LastValue(SINGLE), SeasonalNaive(SINGLE)])


@pytest.fixture
def folder(tmp_path, trained, scores):
    artifact.save(tmp_path / "model", trained, scores)
    return tmp_path / "model"


def test_training_on_ragged_sequences_with_gaps_reduces_the_loss(trained):
    losses = [epoch["loss"] for epoch in trained.history]
    stopping = [epoch["stopping_loss"] for epoch in trained.history]
    assert losses[-1] < 0.8 * losses[0]
    assert stopping[trained.best_epoch - 1] == min(stopping) < stopping[0]


def test_the_trained_network_beats_the_naive_forecasts_on_the_holdout(scores):
    ours, *naive = scores
    assert [entry.name for entry in scores] == ["Millrace", "LastValue", "SeasonalNaive"]
    for baseline in naive:
        assert ours.pinball < 0.95 * baseline.pinball
        assert ours.mse < 0.95 * baseline.mse
        assert ours.labels == baseline.labels > 1000
    assert ours.coverage == pytest.approx(ours.expected_coverage, abs=0.12)


def test_progress_is_reported_step_by_step_and_once_an_epoch_with_the_stopping_loss(trained, reports):
    ends = [report for report in reports if report.stopping_loss is not None]
    assert [report.epoch for report in ends] == [int(epoch["epoch"]) for epoch in trained.history]
    assert len(reports) > 2 * len(ends)
    assert all(0 < report.done <= 1 and report.seconds > 0 for report in reports)


def test_early_stopping_keeps_the_weights_of_the_best_epoch(sequences):
    model = train(sequences, SINGLE, epochs=6, patience=1, learning_rate=0.3, **TINY)
    assert len(model.history) <= model.best_epoch + 1


def test_the_same_seed_gives_the_same_weights(sequences):
    first, second = (train(sequences, SINGLE, epochs=1, seed=5, **TINY).net.model.get_weights() for _ in range(2))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True))


def test_the_feed_forward_network_is_trained_and_stored_by_the_same_functions(sequences, tmp_path):
    model = train(sequences, SINGLE, architecture="feedforward", epochs=2, **SMALL)
    assert model.architecture["window"] == 8
    assert model.history[1]["loss"] < model.history[0]["loss"]
    artifact.save(tmp_path, model)
    loaded = artifact.load(tmp_path, SINGLE)
    assert (loaded.name, loaded.window) == ("FeedForward", 8)


def test_several_targets_a_constant_sensor_and_a_dead_one_train_to_finite_weights():
    values = noisy(SPEC, 6, 120, missing=0.2)
    values[1], values[2], values[3, :, 0] = 4.0, np.nan, np.nan
    data = Sequences(
        np.repeat(np.arange(6, dtype=np.int32), 120),
        np.tile((np.arange(120) + 1) * STEP_MS, 6),
        values.reshape(-1, 3),
        np.zeros(720, bool),
    )
    model = train(data, SPEC, epochs=2, layers=2, **{**TINY, "cell": "lstm"})
    assert all(np.isfinite(weight).all() for weight in model.net.model.get_weights())
    ours, naive = figures(model, data, [LastValue(SPEC)])
    assert np.isfinite([ours.pinball, ours.mse, naive.pinball]).all()
    assert ours.labels > 0


def test_values_after_the_end_of_training_change_no_weight(sequences):
    cutoff_ms = sequences.split_ms(0.2)
    later = sequences.end_ms > cutoff_ms
    assert later.any()
    changed = replace(sequences, values=np.where(later[:, None], 1e6, sequences.values))
    first, second = (train(data, SINGLE, epochs=1, **TINY) for data in (sequences, changed))
    for ours, theirs in zip(first.net.model.get_weights(), second.net.model.get_weights(), strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)
    assert first.history[0]["stopping_loss"] == pytest.approx(second.history[0]["stopping_loss"], rel=1e-4)


def test_a_label_reaches_neither_past_the_border_nor_across_a_reset_nor_into_another_sensor():
    values = np.arange(1.0, 11.0)[:, None]
    sequences = Sequences(
        np.array([0] * 6 + [1] * 4, np.int32),
        np.concatenate([np.arange(1, 7), np.arange(1, 5)]) * STEP_MS,
        values,
        np.array([1, 0, 0, 0, 1, 0, 1, 0, 0, 0], bool),
    )
    spec = SeriesSpec(("a.mean",), (0,), STEP_MS, 3, (0.5,))
    futures = Futures(sequences, spec)
    after = futures.after(np.arange(10), 3 * STEP_MS)[..., 0]
    nan = np.nan
    expected = [[2, 3, nan], [3, nan, nan], *[[nan] * 3] * 4, [8, 9, nan], [9, nan, nan], [nan] * 3, [nan] * 3]
    assert np.array_equal(after, np.array(expected), equal_nan=True)
    assert futures.after(np.array([2]), 9 * STEP_MS)[0, :, 0].tolist() == pytest.approx([4, nan, nan], nan_ok=True)


def test_labels_are_distances_from_the_last_value_in_the_running_scale(trained, sequences):
    ordered = sequences.by_sensor()
    examples = Examples(ordered, SINGLE, trained.forecaster)
    position = np.flatnonzero(np.isfinite(ordered.values[:, 0]))[40:50]
    labels, known = examples.labels(position, int(ordered.end_ms.max()))
    future = np.stack([ordered.values[position + lead, 0] for lead in range(1, SINGLE.horizon + 1)], axis=1)
    expected = (future - ordered.values[position]) / examples.scale[position]
    assert labels[..., 0][known[..., 0]] == pytest.approx(expected[known[..., 0]], rel=1e-4)
    assert (labels[~known] == 0).all()


def test_pieces_cover_every_run_once_wherever_the_cut_begins():
    start, end = np.array([0, 100, 130]), np.array([100, 130, 130])  # the last run has no step before the border
    for offset in (0, 7, 39):
        pieces = cut_pieces(start, end, 40, np.full(3, offset), 5)
        assert (pieces.start < pieces.end).all()
        covered = np.concatenate([np.arange(a, b) for a, b in zip(pieces.start, pieces.end)])
        assert np.array_equal(np.sort(covered), np.arange(130))
        assert (pieces.end - pieces.start <= 40).all()
        assert (pieces.count_from == pieces.start + 5).all()


def test_lanes_go_through_all_pieces_in_order_and_start_each_with_an_empty_state():
    start, end = np.array([0, 10, 50]), np.array([10, 50, 53])
    pieces = cut_pieces(start, end, 20, np.zeros(3, np.int64), 2)
    counted, lane_of = [], {}
    for position, live, counts, fresh in lane_chunks(pieces, np.arange(len(pieces.start)), 2, 8):
        for lane in range(2):
            at = position[lane][live[lane]]
            if len(at) and not fresh[lane]:
                assert at[0] == lane_of[lane] + 1
            if len(at):
                assert not fresh[lane] or at[0] in pieces.start
                lane_of[lane] = at[-1]
        counted += position[counts].tolist()
    warming = {s + i for s in pieces.start for i in range(2)}
    assert sorted(counted) == [p for p in range(53) if p not in warming]


def test_a_history_without_a_label_is_refused():
    short = Sequences(np.zeros(3, np.int32), np.arange(3) * STEP_MS, np.ones((3, 1)), np.zeros(3, bool))
    with pytest.raises(TrainingError, match="no label in"):
        train(short, SINGLE, epochs=1, **SMALL)
    with pytest.raises(TrainingError, match="0 steps"):
        train(short.until(-1), SINGLE, epochs=1, **SMALL)


class Oracle:
    """Knows the future: what an evaluation that is one step off would not forgive."""

    name = version = "Oracle"
    warmup_steps = 0

    def __init__(self, spec, rate):
        self.spec, self.rate = spec, rate

    def columns(self):
        return ()

    def advance(self, rows, block, context):
        lead = np.arange(1, self.spec.horizon + 1)[:, None] * self.spec.step_ms
        mean = (self.rate * (block.end_ms[..., None, None] + lead)).astype(np.float32)
        return Prediction(mean, np.repeat(mean[..., None], len(self.spec.quantiles), axis=-1))


def test_a_perfect_forecaster_scores_zero():
    steps = 300
    end_ms = np.tile((np.arange(steps) + 1) * STEP_MS, 2)
    rate = 2.0**-16  # exact in float32
    data = Sequences(
        np.repeat(np.arange(2, dtype=np.int32), steps), end_ms, rate * end_ms[:, None], np.zeros(600, bool)
    )
    oracle, last = evaluate(data, [Oracle(SINGLE, rate), LastValue(SINGLE)], data.split_ms(0.2))
    assert (oracle.mse, oracle.pinball) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert oracle.coverage == 1
    assert last.mse > 0.001
    assert oracle.labels == sum(2 * (60 - lead) for lead in range(1, SINGLE.horizon + 1))


def test_the_unit_of_errors_is_the_deviation_in_the_training_part():
    values = np.array([1.0, 3.0, 1.0, 3.0, 1e9, 7.0, 7.0, np.nan, 7.0, 7.0])[:, None]
    data = Sequences(np.repeat(np.arange(2, dtype=np.int32), 5), np.tile(np.arange(5), 2), values, np.zeros(10, bool))
    unit = training_deviation(data, SINGLE, 3)
    assert unit[:, 0] == pytest.approx([1.0, np.nan], nan_ok=True)


def test_a_saved_model_forecasts_as_before(folder, trained):
    loaded = artifact.load(folder, SINGLE)
    values = noisy(SINGLE, 3, 20)
    ours, theirs = Bench(loaded, 3).advance(values), Bench(trained.forecaster, 3).advance(values)
    assert np.array_equal(ours.mean, theirs.mean, equal_nan=True)
    assert np.array_equal(ours.quantiles, theirs.quantiles, equal_nan=True)
    assert loaded.warmup_steps == 6
    assert loaded.version == trained.forecaster.version


def test_the_manifest_says_what_the_model_is_and_how_good(folder):
    manifest = artifact.read_manifest(folder)
    assert manifest["version"] == f"gru12-{manifest['sha256'][:12]}"
    assert manifest["architecture"] == {"kind": "rnn", "cell": "gru", "units": 12, "layers": 1}
    assert [entry["name"] for entry in manifest["figures"]] == ["Millrace", "LastValue", "SeasonalNaive"]
    assert manifest["data"]["sensors"] == 16
    assert artifact.spec_from_dict(manifest["spec"]) == SINGLE
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.keras"]


def test_a_changed_byte_is_noticed_before_keras_sees_it(folder):
    path = folder / "model.keras"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(artifact.ArtifactError, match=r"model\.keras: sha256 .*expected .*train again"):
        artifact.load(folder)


def test_a_model_for_another_series_is_refused_with_what_differs(folder):
    other = replace(SINGLE, horizon=7, quantiles=(0.5,))
    with pytest.raises(artifact.ArtifactError, match="made for horizon=6") as caught:
        artifact.load(folder, other)
    assert "horizon=7, quantiles=(0.5,)" in str(caught.value)
    assert "train a model with these settings" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "format 'list'"),
        ('{"format": 99}', "format 99; expected format 2"),
        ('{"format": 1}', "format 1; expected format 2"),
        ('{"format": 2}', "no version, spec"),
    ],
)
def test_a_manifest_that_is_none_is_refused(folder, content, message):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(artifact.ArtifactError, match=message):
        artifact.load(folder)


def test_missing_files_are_named(tmp_path, folder):
    with pytest.raises(artifact.ArtifactError, match=r"nowhere.manifest\.json: no such file"):
        artifact.load(tmp_path / "nowhere")
    (folder / "model.keras").unlink()
    with pytest.raises(artifact.ArtifactError, match=r"model\.keras: no such file"):
        artifact.load(folder)


def test_a_model_that_is_not_keras_is_refused_even_with_the_right_hash(folder):
    import hashlib

    (folder / "model.keras").write_bytes(b"not a zip file")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = hashlib.sha256(b"not a zip file").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(artifact.ArtifactError, match="cannot read it"):
        artifact.load(folder)


def test_the_memory_of_training_is_the_memory_of_service(trained, sequences):
    """The inputs that the network learned from equal those of a sensor driven step by step."""
    ordered = sequences.by_sensor()
    examples = Examples(ordered, SINGLE, trained.forecaster)
    own = ordered.sensor == 1  # a sensor without a reset in between
    assert ordered.reset[own].sum() == 1
    bench = Bench(trained.forecaster, 1)
    memory = SeriesMemory(SINGLE, bench.forecaster.ring_steps)
    from models.forecaster import StepBlock

    for at in np.flatnonzero(own)[:60]:
        step = StepBlock(ordered.values[None, [at]], ordered.end_ms[None, [at]], np.ones((1, 1), bool))
        context = memory.advance(bench.rows, step)
        assert np.array_equal(trained.forecaster.inputs(context)[0, 0], examples.inputs[at])
