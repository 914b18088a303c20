"""A key over code is over all files that compute the value, wherever they lie."""

from __future__ import annotations

import pytest

from claq_exp.run import cut, job, measuring
from claq_exp.sources import code
from claq_exp.sources.code import (
    PACKAGE,
    code_behind,
    code_of,
    import_graph,
    package_files,
    reached,
)

KEYS = {
    "scores of an original": measuring.ORIGINAL_CODE,
    "scores of a checkpoint": measuring.CHECKPOINT_CODE,
    "a survey": job.SURVEY_CODE,
    "token windows": (cut.__name__,),
}


@pytest.fixture
def package(tmp_path):
    """A package whose files a test may change."""
    files = {
        "__init__.py": "from pack.other import x\n",
        "plain.py": "import torch\nfrom pack.folder.first import one\n",
        "lazy.py": "def f():\n    from pack.folder import second\n    import pack.other\n",
        "named.py": "import importlib\nimportlib.import_module('pack.lazy')\n",
        "typed.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from pack.other import x\nelse:\n    import pack.plain\n"
        ),
        "other.py": "x = 1\n",
        "folder/__init__.py": "",
        "folder/first.py": "one = 1\n",
        "folder/second.py": "from pack.folder.first import one\n",
        "bare/deep.py": "from pack import other as renamed\n",
    }
    for name, text in files.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "pack"


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("plain", {"plain", "folder", "folder.first"}),
        ("lazy", {"lazy", "other", "folder", "folder.first", "folder.second"}),
        ("named", {"named", "lazy", "other", "folder", "folder.first", "folder.second"}),
        ("typed", {"typed", "plain", "folder", "folder.first"}),
        ("bare.deep", {"bare.deep", "other"}),
    ],
)
def test_all_that_a_module_imports_is_found(module, found, package):
    graph = import_graph(package_files(package))
    assert set(reached(graph, [f"pack.{module}"])) == {f"pack.{name}" for name in found}


def test_circles_end(package):
    (package / "other.py").write_text("from pack.bare import deep\n")
    graph = import_graph(package_files(package))
    assert reached(graph, ["pack.other"]) == ["pack.bare.deep", "pack.other"]


def test_no_files_and_modules_that_are_not_there_are_errors(package, tmp_path):
    with pytest.raises(ValueError, match="no source files"):
        code_of([])
    with pytest.raises(ValueError, match="no source files"):
        code_of(tmp_path.glob("moved/*.py"))
    with pytest.raises(ValueError, match=r"no module pack\.moved"):
        reached(import_graph(package_files(package)), ["pack.plain", "pack.moved"])
    with pytest.raises(ValueError, match="no module"):
        code_behind("claq_exp.moved")


def test_code_that_changes_is_other_code(tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text("x = 1\n")
    before = code_of(files)
    assert code_of(reversed(files)) == before
    files[1].write_text("x = 2\n")
    assert code_of(files) != before


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_has_files(kind):
    assert code_behind(*KEYS[kind]) == code_behind(*KEYS[kind])


def test_every_file_that_computes_a_value_changes_its_key():
    graph = import_graph(package_files(PACKAGE))
    behind = {kind: set(reached(graph, modules)) for kind, modules in KEYS.items()}
    models = {f"claq_exp.models.{name}" for name in ("blocks", "stream", "experts", "load")}
    for kind in ("scores of an original", "scores of a checkpoint", "a survey"):
        assert models <= behind[kind], kind
    assert "claq_exp.evaluation.perplexity" in behind["scores of an original"]
    assert "claq_exp.payload.columns" in behind["scores of a checkpoint"]
    assert "claq_exp.calibration.moments" in behind["a survey"]
    assert {"claq_exp.calibration.windows", "claq_exp.sources.text"} <= behind["token windows"]


def test_what_only_quantizes_does_not_measure_an_original_again():
    graph = import_graph(package_files(PACKAGE))
    behind = reached(graph, KEYS["scores of an original"])
    assert not [name for name in behind if name.startswith("claq_exp.quantize")]


def test_a_change_of_one_file_behind_a_key_is_another_key(package, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", package)
    behind = code._code_behind.__wrapped__
    before = behind(("pack.lazy",))
    (package / "plain.py").write_text("x = 2\n")
    assert behind(("pack.lazy",)) == before
    (package / "folder/first.py").write_text("one = 2\n")
    assert behind(("pack.lazy",)) != before
