"""The jars of the local broker: resolved once through Maven, kept in a cache that every broker of this user shares.

`deploy/kafka/pom.xml` pins the version. An installed wheel carries it as a package resource. The cache folder is named
after the version and the pom's hash, so that an upgrade resolves anew and an older installation keeps what it has.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from pipeline.errors import DeploymentError

ALTERNATIVES = (
    "Or use a broker of another kind: `docker compose up kafka` starts one in a container, "
    "`--bootstrap-servers HOST:PORT` (or [kafka] bootstrap_servers) names one that runs already."
)
RESOLVE_TIMEOUT_SECONDS = 900.0
_POM_NAMESPACE = {"pom": "http://maven.apache.org/POM/4.0.0"}


def resource(name: str) -> bytes:
    """A file of the local broker: from the installed package, or from deploy/kafka of a checkout."""
    packaged = resources.files("pipeline.kafka") / "_local_broker" / name
    if packaged.is_file():
        return packaged.read_bytes()
    in_checkout = Path(__file__).resolve().parents[2] / "deploy" / "kafka" / name
    if in_checkout.is_file():
        return in_checkout.read_bytes()
    raise DeploymentError(
        f"{name} of the local broker is neither in the package ({packaged}) nor in a checkout ({in_checkout}): "
        f"install millrace again. {ALTERNATIVES}"
    )


def kafka_version(pom: bytes) -> str:
    """The version of Apache Kafka that a pom pins, from its property kafka.version.

    >>> kafka_version(b'<project xmlns="http://maven.apache.org/POM/4.0.0"><properties>'
    ...               b'<kafka.version>4.3.1</kafka.version></properties></project>')
    '4.3.1'
    """
    version = ElementTree.fromstring(pom).findtext("pom:properties/pom:kafka.version", namespaces=_POM_NAMESPACE)
    if not version:
        raise DeploymentError("pom.xml of the local broker has no property kafka.version: install millrace again.")
    return version


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the jars are kept: $XDG_CACHE_HOME/millrace, or ~/.cache/millrace."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "millrace"


def find_java(environ: Mapping[str, str] = os.environ) -> str:
    """The java program: $JAVA_HOME/bin/java where it exists, else the one on PATH."""
    home = environ.get("JAVA_HOME", "")
    if home and os.access(Path(home) / "bin" / "java", os.X_OK):
        return str(Path(home) / "bin" / "java")
    java = shutil.which("java", path=environ.get("PATH"))
    if java is None:
        raise DeploymentError(
            "A local broker needs Java 17 or newer, and no `java` is on the PATH. "
            f"Debian and Ubuntu: apt-get install openjdk-17-jre-headless. {ALTERNATIVES}"
        )
    return java


def resolve(cache_dir: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder with the broker's jars; the first call has Maven fetch them (about 54 MB).

    Safe when several processes call it at once: one resolves, the others wait; the folder appears whole or not at all.

    Raises:
        DeploymentError: no Maven, or Maven could not fetch the jars.
    """
    pom = resource("pom.xml")
    root = cache_dir or default_cache_dir(environ)
    target = root / f"kafka-{kafka_version(pom)}-{hashlib.sha256(pom).hexdigest()[:12]}"
    if target.is_dir():
        return target
    maven = _find_maven(environ)
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f"{target.name}.lock"):
        if not target.is_dir():
            _resolve_into(target, pom, maven)
    return target


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock file while the block runs; another process waits. The kernel lets go of it when a holder dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _find_maven(environ: Mapping[str, str]) -> str:
    maven = shutil.which("mvn", path=environ.get("PATH"))
    if maven is None:
        raise DeploymentError(
            "The local broker's jars are fetched with Maven, and no `mvn` is on the PATH. "
            f"Debian and Ubuntu: apt-get install maven. {ALTERNATIVES}"
        )
    return maven


def _resolve_into(target: Path, pom: bytes, maven: str) -> None:
    """Lets Maven work beside the target, then renames: whatever interrupts this, a folder of that name is complete."""
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as scratch:
        pom_path, jars = Path(scratch, "pom.xml"), Path(scratch, "lib")
        pom_path.write_bytes(pom)
        goal = [maven, "-q", "-B", "-f", str(pom_path), "dependency:copy-dependencies"]
        _run_maven([*goal, "-DincludeScope=runtime", f"-DoutputDirectory={jars}"])
        os.rename(jars, target)


def _run_maven(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=RESOLVE_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeploymentError(
            f"Maven did not fetch the local broker's jars within {RESOLVE_TIMEOUT_SECONDS:.0f} s: is its repository "
            f"reachable (proxy and mirror are set in ~/.m2/settings.xml)? {ALTERNATIVES}"
        ) from None
    if done.returncode != 0:
        said = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[:8])
        raise DeploymentError(
            f"Maven could not fetch the local broker's jars (exit status {done.returncode}); it said:\n  {said}\n"
            f"Is its repository reachable? Proxy and mirror are set in ~/.m2/settings.xml. {ALTERNATIVES}"
        )
