"""The project's own scaffold: what is installed, what make and CI run, and what the metadata promises."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"ascend_dynamo": "ascend_dynamo", "ascend_dynamo.patterns": "patterns", "ascend_dynamo.lowering": "lowering"}


def source_files(suffix: str = ".py") -> list[Path]:
    return [p for folder in SOURCES.values() for p in sorted((ROOT / folder).rglob(f"*{suffix}"))]


def installed_name(path: Path) -> str:
    """``patterns/gelu.py`` -> ``ascend_dynamo/patterns/gelu.py``."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("ascend_dynamo/") else f"ascend_dynamo/{relative}"


def test_the_list_of_packages_is_complete() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    found = {Path(installed_name(p)).parent.as_posix().replace("/", ".") for p in source_files()}
    assert sorted(listed) == sorted(found), "pyproject.toml: tool.setuptools.packages"
    assert PROJECT["tool"]["setuptools"]["package-dir"] == SOURCES
    for path in source_files():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that no build/ folder of an earlier day takes part."""
    root = tmp_path_factory.mktemp("wheel")
    copy = root / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for folder in SOURCES.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (built,) = root.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {installed_name(p) for suffix in (".py", ".cpp", ".h") for p in source_files(suffix)}
    assert wanted <= names and "ascend_dynamo/py.typed" in names
    info = f"ascend_dynamo-{PROJECT['project']['version']}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= names
    assert {name.split("/")[0] for name in names} == {"ascend_dynamo", info}


def declared_entry_points() -> list[EntryPoint]:
    groups = {**PROJECT["project"]["entry-points"], "console_scripts": PROJECT["project"]["scripts"]}
    return [EntryPoint(name, value, group) for group, points in groups.items() for name, value in points.items()]


@pytest.mark.parametrize("point", declared_entry_points(), ids=lambda p: f"{p.group}:{p.name}")
def test_every_entry_point_is_installed_and_loads(point: EntryPoint) -> None:
    assert callable(point.load())
    assert point in [EntryPoint(e.name, e.value, e.group) for e in entry_points(group=point.group)]


def test_versions_agree() -> None:
    import ascend_dynamo

    version = PROJECT["project"]["version"]
    assert ascend_dynamo.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_the_package_exports_exists() -> None:
    import ascend_dynamo

    for name in ascend_dynamo.__all__:
        assert callable(getattr(ascend_dynamo, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ascend_dynamo.nothing


def test_private_torch_stays_in_its_one_place() -> None:
    found = []
    for path in source_files():
        if path.name == "_torch_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {n}" for n in names if private(n)]  # type: ignore[attr-defined]
    assert not found


# No stable names, but used so widely that they count as public; operators are public whatever their name.
PUBLIC_ENOUGH = re.compile(
    r"torch\.(ops\.|utils\._pytree|_subclasses(\.FakeTensorMode)?$|_ops(\.OpOverload(Packet)?)?$|_C(\._nn(\.\w+)?)?$"
    r"|utils\._python_dispatch(\.TorchDispatchMode)?$)"
)


def private(name: str) -> bool:
    return bool(re.match(r"torch(\.\w+)*\._[a-zA-Z]", name)) and not PUBLIC_ENOUGH.match(name)


def test_dependencies_point_one_way() -> None:
    """The core finds patterns and lowerings through entry points and imports neither."""
    for path in sorted((ROOT / "ascend_dynamo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [module] if module else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                where = f"{path.relative_to(ROOT)}: {name}"
                assert not name.startswith(("ascend_dynamo.patterns", "ascend_dynamo.lowering")), where


def test_files_stay_small() -> None:
    long = {str(p.relative_to(ROOT)): n for p in source_files() if (n := len(p.read_text().splitlines())) > 450}
    assert not long


@pytest.mark.parametrize("goal", ["demo", "test", "soak", "lint", "typecheck"])
def test_make_installs_torch_before_anything_else(goal: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--dry-run", goal, f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installs = [line for line in done.stdout.splitlines() if "pip" in line and "install" in line]
    assert '"torch==2.13.0"' in installs[0]
    assert all("torch==" in i or "--constraint constraints.txt" in i or "--no-deps" in i for i in installs)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_make_test_enforces_the_floor_and_ci_checks_everything() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run")
    assert "--cov-fail-under=90" in makefile and "--cov-branch" in makefile
    assert PROJECT["tool"]["coverage"]["run"]["source"] == list(SOURCES.values())
    text = ci.read_text()
    assert ci.stat().st_mode & 0o111 and "set -euo pipefail" in text
    for step in ("make test", "ruff check", "ruff format --check", "make typecheck"):
        assert step in text
