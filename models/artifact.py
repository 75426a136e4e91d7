"""A trained model as a folder: `model.keras` and `manifest.json`. No pickle anywhere.

save(folder, model, figures)        each file appears whole or not at all; the manifest last, so that it names what
is there load(folder, expect=spec)           sha256 verified, then Keras with safe_mode, then the spec compared
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from models.evaluation import Figures
from models.feedforward import FeedForward
from models.forecaster import Model, Rows, SeriesSpec
from models.rnn import Network, RNNForecaster, load_tensorflow
from models.training import TrainedModel, in_profile

FORMAT = 2
"""2: networks see values around their local level; weights of format 1 were trained on other inputs."""
MODEL_FILE, MANIFEST_FILE = "model.keras", "manifest.json"
PRIOR_MEMBER = "prior.npz"
"""What the stages around the network knew at the end of its training, inside the model file."""
KINDS: dict[str, type[RNNForecaster] | type[FeedForward]] = {"rnn": RNNForecaster, "feedforward": FeedForward}
REQUIRED = ("format", "version", "spec", "architecture", "warmup_steps", "sha256")


class ArtifactError(Exception):
    """A model folder that cannot be used: names the file, what was found, what was expected and how to mend it."""

    def __init__(self, file: Path, found: str, expected: str, mend: str) -> None:
        super().__init__(f"{file}: {found}; expected {expected}; {mend}")
        self.file, self.found, self.expected, self.mend = file, found, expected, mend


def save(folder: Path, model: TrainedModel, figures: Sequence[Figures] = ()) -> dict[str, Any]:
    """Write the model and its manifest; the manifest is returned, and the model's version set to what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        written = Path(scratch) / MODEL_FILE
        model.net.model.save(written)
        _add_prior(written, model)
        text = json.dumps(_manifest(model, figures, _sha256(written)), indent=2, allow_nan=False)
        described = Path(scratch) / MANIFEST_FILE
        described.write_text(text + "\n", encoding="utf-8")
        for path in (written, described):
            _sync(path)
            os.replace(path, folder / path.name)
    manifest: dict[str, Any] = json.loads(text)  # as whoever reads the file sees it
    model.forecaster.version = manifest["version"]
    return manifest


def load(folder: Path, expect: SeriesSpec | None = None, brought: bool = False) -> Model:
    """The forecaster, ready to advance. expect: the series it is to serve; None = whatever it was trained on. brought: it
    may differ in what a model brings along itself.

    Raises ArtifactError: a file is missing, damaged, of another format, or made for another series.
    """
    manifest = read_manifest(folder)
    path = folder / MODEL_FILE
    spec = spec_from_dict(manifest["spec"])
    if expect is not None:
        _compare(folder / MANIFEST_FILE, spec, expect, expect.brought if brought else expect.brought[2:])
    if not path.is_file():
        raise ArtifactError(path, "no such file", "the weights that the manifest names", "run `millrace train` again")
    found = _sha256(path)
    if found != manifest["sha256"]:
        raise ArtifactError(
            path, f"sha256 {found}", f"{manifest['sha256']} as in {MANIFEST_FILE}", "copy the folder or train again"
        )
    forecaster = KINDS[manifest["architecture"]["kind"]]
    net = Network(_load_keras(path), spec)
    network = forecaster(net, version=manifest["version"], warmup_steps=manifest["warmup_steps"])
    return in_profile(network, _prior(path))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, checked for its format; no TensorFlow."""
    path = folder / MANIFEST_FILE
    retrain = "run `millrace train` to write a new one"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(path, "no such file", "a model that `millrace train` wrote", retrain) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(path, f"not JSON ({error})", "a manifest", retrain) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(path, f"format {found!r}", f"format {FORMAT}", retrain)
    missing = [name for name in REQUIRED if name not in manifest]
    if missing or manifest["architecture"].get("kind") not in KINDS:
        found = f"no {', '.join(missing)}" if missing else f"architecture {manifest['architecture']!r}"
        raise ArtifactError(path, found, f"{', '.join(REQUIRED)}; a kind among {', '.join(KINDS)}", retrain)
    return manifest


def spec_from_dict(fields: dict[str, Any]) -> SeriesSpec:
    """The inverse of `dataclasses.asdict` through JSON, where tuples became lists."""
    named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return SeriesSpec(**named)


def _manifest(model: TrainedModel, figures: Sequence[Figures], sha256: str) -> dict[str, Any]:
    shape = model.architecture
    return {
        "format": FORMAT,
        "version": f"{shape.get('cell', shape['kind'])}{shape['units']}-{sha256[:12]}",
        "sha256": sha256,
        "spec": asdict(model.forecaster.spec),
        "architecture": shape,
        "warmup_steps": model.forecaster.warmup_steps,
        "data": model.data,
        "holdout_from_ms": model.holdout_from_ms,
        "figures": [_finite(entry.to_dict()) for entry in figures],
        "epochs": [_finite(epoch) for epoch in model.history],
        "best_epoch": model.best_epoch,
        "warm": model.warm,
        "seed": model.seed,
        "libraries": _libraries(),
    }


def _libraries() -> dict[str, str]:
    import keras
    import numpy

    return {"tensorflow": load_tensorflow().__version__, "keras": keras.__version__, "numpy": numpy.__version__}


def _load_keras(path: Path) -> Any:
    load_tensorflow()
    import keras

    from models import nets  # noqa: F401  (registers the layers)

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise ArtifactError(
            path, f"Keras {keras.__version__} cannot read it ({error})", "a model of this version", "train again"
        ) from error


def _compare(path: Path, found: SeriesSpec, expected: SeriesSpec, own: Sequence[str]) -> None:
    ours, theirs = asdict(expected), asdict(found)
    different = [name for name in ours if ours[name] != theirs[name] and name not in own]
    if different:
        raise ArtifactError(
            path,
            "made for " + ", ".join(f"{name}={theirs[name]!r}" for name in different),
            ", ".join(f"{name}={ours[name]!r}" for name in different) + " as the settings say",
            "train a model with these settings, or set them back",
        )


def _add_prior(path: Path, model: TrainedModel) -> None:
    """Into the archive that Keras wrote, which leaves members that it does not know alone."""
    prior = model.before.prior() if model.before else {}
    if prior:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(PRIOR_MEMBER, "w") as member:
            np.savez(member, allow_pickle=False, **prior)


def _prior(path: Path) -> Rows | None:
    with zipfile.ZipFile(path) as archive:
        if PRIOR_MEMBER not in archive.namelist():
            return None
        with np.load(io.BytesIO(archive.read(PRIOR_MEMBER)), allow_pickle=False) as arrays:
            return dict(arrays)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null in its place."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
