"""What `millrace broker start` says before any JVM runs: no Java, no Maven, a Maven that fails."""

import stat
import sys
from pathlib import Path

import pytest

from pipeline.errors import DeploymentError
from pipeline.kafka import jars


def program(path: Path, script: str) -> Path:
    """A program in Python, executable under this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_java_the_error_says_what_to_install_and_what_else_there_is(tmp_path):
    with pytest.raises(DeploymentError) as caught:
        jars.find_java({"PATH": str(tmp_path)})
    for part in ("openjdk-17-jre-headless", "docker compose up kafka", "--bootstrap-servers"):
        assert part in str(caught.value)


def test_without_maven_the_error_says_what_to_install_and_what_else_there_is(tmp_path):
    with pytest.raises(DeploymentError) as caught:
        jars.resolve(tmp_path / "cache", {"PATH": str(tmp_path)})
    for part in ("apt-get install maven", "docker compose up kafka", "--bootstrap-servers"):
        assert part in str(caught.value)


def test_java_home_goes_before_the_path(tmp_path):
    java = program(tmp_path / "jdk" / "bin" / "java", "")
    program(tmp_path / "other" / "java", "")
    environ = {"JAVA_HOME": str(tmp_path / "jdk"), "PATH": str(tmp_path / "other")}
    assert jars.find_java(environ) == str(java)
    assert jars.find_java(environ | {"JAVA_HOME": str(tmp_path / "gone")}) == str(tmp_path / "other" / "java")


def test_what_a_failing_maven_says_is_shown_and_nothing_stays_behind(tmp_path):
    program(tmp_path / "bin" / "mvn", 'print("[ERROR] no such artifact"); raise SystemExit(1)')
    with pytest.raises(DeploymentError, match="no such artifact"):
        jars.resolve(tmp_path / "cache", {"PATH": str(tmp_path / "bin")})
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_the_cache_follows_xdg_cache_home():
    assert jars.default_cache_dir({"XDG_CACHE_HOME": "/elsewhere"}) == Path("/elsewhere/millrace")
    assert jars.default_cache_dir({}) == Path.home() / ".cache" / "millrace"


def test_compose_and_pom_name_the_same_kafka():
    compose = (Path(__file__).resolve().parents[2] / "docker-compose.yml").read_text()
    assert f"image: apache/kafka:{jars.kafka_version(jars.resource('pom.xml'))}" in compose


def test_a_pom_without_a_version_is_refused():
    with pytest.raises(DeploymentError, match=r"kafka\.version"):
        jars.kafka_version(b'<project xmlns="http://maven.apache.org/POM/4.0.0"/>')
