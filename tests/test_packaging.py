"""What the package promises of itself agrees: workflows, versions of Python, extras, targets."""

from __future__ import annotations

import re
import runpy
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PACKAGES = ("shared_engine", "langchain_nemoretriever", "llamaindex_nemoretriever", "cookbook")
DOCUMENTS = sorted(
    chain(
        ROOT.glob("*.md"),
        ROOT.glob(".github/*.md"),
        *(ROOT.glob(f"{package}/**/*.{kind}") for package in PACKAGES for kind in ("md", "py")),
    )
)
TARGET = re.compile(r"(?:^    |run: |`)make ([a-z-]+)", re.MULTILINE)
EXTRA = re.compile(
    r"(?:nemoretriever-embeddings|install(?: -c constraints\.txt)? '?\.)\[([\w,]+)\]"
)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_classifiers() -> list[str]:
    """Return the versions of Python among the classifiers, as "3.11"."""
    return re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_allowed_to_read_and_no_more(path):
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert job.get("permissions", {}).keys() <= {"id-token"}
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)


def test_every_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    files = [*WORKFLOWS, ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md"]
    named = {
        target for path in files for target in TARGET.findall(path.read_text(encoding="utf-8"))
    }
    assert {"check", "docs", "test", "test-all"} <= named <= targets


def test_ci_runs_the_versions_of_python_that_the_package_names():
    tested = read_yaml(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert tested["python"] == read_classifiers()
    assert PROJECT["requires-python"] == f">={read_classifiers()[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == read_classifiers()[0]


def test_every_extra_that_is_named_exists():
    named = set(
        chain.from_iterable(
            extras.split(",")
            for path in DOCUMENTS
            for extras in EXTRA.findall(path.read_text(encoding="utf-8"))
        )
    )
    assert {"langchain", "local"} <= named <= PROJECT["optional-dependencies"].keys()


def test_the_oldest_versions_are_known_and_each_is_one(monkeypatch):
    """CI installs them; two versions of one package could not be installed."""
    monkeypatch.chdir(ROOT)
    oldest = runpy.run_path(str(ROOT / ".github/oldest.py"))["list_oldest"]
    pins = sorted(set(oldest([*PROJECT["dependencies"], f"{PROJECT['name']}[all]"])))
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    assert {"httpx", "langchain-core", "llama-index-core", "torch"} <= set(names)


def test_every_dependency_has_a_pin():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PROJECT["dependencies"], *chain.from_iterable(extras)]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}
    assert names - {PROJECT["name"]} - set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)) == set()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_asks_for(path):
    form = read_yaml(path)
    if path.stem == "config":
        assert all(link.keys() == {"name", "url", "about"} for link in form["contact_links"])
        return
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)


def test_the_class_named_to_llamahub_exists():
    llamahub = PYPROJECT["tool"]["llamahub"]
    package = __import__(llamahub["import_path"])
    assert set(llamahub["class_authors"]) == set(dir(package))
