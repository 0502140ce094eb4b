"""The command line: what it prints, what it writes, and what its exit codes mean."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ascend_dynamo import cli
from ascend_dynamo.contracts import Domain
from ascend_dynamo.errors import OptionError
from ascend_dynamo.match.finding import Finding
from ascend_dynamo.report import catalogue, environment
from ascend_dynamo.report.loading import TargetError, load_target

SCRIPT = """
import torch, torch.nn.functional as F

class Net(torch.nn.Module):
    def forward(self, x, y=None):
        return F.gelu(x) + (x if y is None else y)

def make():
    return Net(), (torch.ones(2, 8),)

def single():
    return Net(), torch.ones(2, 8)

def named():
    return Net(), {"x": torch.ones(2, 8)}, {"y": torch.zeros(2, 8)}

def wrong():
    return 3

CONSTANT = 1
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "net_for_cli.py"
    path.write_text(SCRIPT)
    return path


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASCEND_DYNAMO_LEVEL", "1")
    assert cli.main(["info"]) == cli.OK
    out = capsys.readouterr().out
    assert "torch " in out and "builtin (ascend-dynamo" in out and "gelu_add" in out and "ASCEND_DYNAMO_LEVEL=1" in out
    assert cli.main(["info", "--json"]) == cli.OK
    data = json.loads(capsys.readouterr().out)
    assert data["target"] == {"asked": "auto", "chosen": "cpu"} or data["target"]["chosen"] == "npu"
    assert {"cpu", "reference"} <= {x["name"] for x in data["lowerings"]}
    assert data["versions"]["python"] and data["cpu"]["threads"] >= 1


def test_cpu_features_are_read_from_the_kernel(tmp_path: Path):
    (tmp_path / "x86").write_text("processor: 0\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    (tmp_path / "arm").write_text("Features\t: fp asimd sve bf16\n")
    (tmp_path / "none").write_text("processor: 0\n")
    assert environment.cpu_features(tmp_path / "x86") == ["avx2", "avx512f", "amx_bf16"]
    assert environment.cpu_features(tmp_path / "arm") == ["sve", "bf16"]
    assert environment.cpu_features(tmp_path / "none") == environment.cpu_features(tmp_path / "missing") == []


def test_explain_prints_writes_and_dumps(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    html, dump = tmp_path / "report.html", tmp_path / "dump"
    argv = ["explain", f"{script}:make", "-o", "target=reference", "--html", str(html), "--dump", str(dump)]
    assert cli.main(argv) == cli.OK
    out = capsys.readouterr()
    assert "Net: 1 graph compiled" in out.out and "fired: gelu_add x1" in out.out and "+%" in out.out
    assert "ascend.gelu_add" in html.read_text() and str(html) in out.err
    assert (dump / "graph_0000" / "after.txt").exists()


def test_explain_as_json_and_without_diff(script: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["explain", f"{script}:single", "-o", "target=reference", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["fired"] == {"gelu_add": 1}
    assert cli.main(["explain", f"{script}:named", "-o", "target=reference", "--no-diff"]) == cli.OK
    assert "Diff" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["explain", "nonsense"], "names no callable"),
        (["explain", "missing.py:make"], "there is no file"),
        (["explain", "no.such.module:make"], "there is no module"),
        (["explain", "SCRIPT:maker"], "has no callable 'maker'; it has: Net, make"),
        (["explain", "SCRIPT:wrong"], "must return (model, args)"),
        (["explain", "SCRIPT:make", "-o", "level"], "write NAME=VALUE"),
        (["explain", "SCRIPT:make", "-o", "levle=1"], "levle"),
        (["patterns", "show", "gelu_ad"], 'did you mean "gelu_add"'),
        (["patterns", "check", "--only", "nothing_like_it"], "there is no pattern"),
    ],
)
def test_wrong_usage_is_said_in_one_line(script: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([a.replace("SCRIPT", str(script)) for a in argv]) == cli.USAGE
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_an_unmet_expectation_is_found_not_usage(script: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["explain", f"{script}:make", "-o", "target=reference", "-o", "expect={'rms_norm': 2}"]
    assert cli.main(argv) == cli.FOUND
    assert "rms_norm" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["nothing"], ["patterns"], ["patterns", "check", "--budget", "0"]])
def test_argparse_exits_with_two(argv: list[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == cli.USAGE


def test_options_are_literals_or_text():
    assert cli.parse_options(["level=1", "target=cpu", "expect={'a': 2}"]) == {
        "level": 1,
        "target": "cpu",
        "expect": {"a": 2},
    }
    with pytest.raises(OptionError):
        cli.parse_options(["level"])


def test_a_module_is_imported_and_its_own_failures_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cli_good.py").write_text(SCRIPT)
    (tmp_path / "cli_bad.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    model, args, kwargs = load_target("cli_good:make")
    assert len(args) == 1 and kwargs == {} and callable(model)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_target("cli_bad:make")
    with pytest.raises(TargetError):
        load_target("cli_good:CONSTANT")


def test_patterns_list_and_show(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["patterns", "list"]) == cli.OK
    assert "gelu_add" in capsys.readouterr().out
    assert cli.main(["patterns", "list", "--json"]) == cli.OK
    (one,) = [p for p in json.loads(capsys.readouterr().out) if p["name"] == "gelu_add"]
    assert one["shapes"]["x"] == ["*B", "H"] and one["file"].split(":")[0].endswith("gelu_add.py")
    assert cli.main(["patterns", "show", "gelu_add"]) == cli.OK
    out = capsys.readouterr().out
    assert "x [*B, H]" in out and "H 1.." in out and "PATTERNS = (" in out


class Entry:
    """An entry point of a plugin that is broken."""

    name, value, dist = "broken", "nowhere:registry", None

    def load(self) -> None:
        raise RuntimeError("kernel not built")


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real = metadata.entry_points
    broken = {catalogue.GROUP: [Entry()]}
    monkeypatch.setattr(metadata, "entry_points", lambda group: broken.get(group) or real(group=group))
    assert cli.main(["info"]) == cli.FOUND
    assert "broken (unknown package): failed: RuntimeError: kernel not built" in capsys.readouterr().out
    assert cli.main(["patterns", "list"]) == cli.FOUND
    assert "plugin broken of unknown package (nowhere:registry)" in capsys.readouterr().err


def test_check_of_a_sound_pattern_finds_nothing(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["patterns", "check", "--only", "gelu_add", "--budget", "2"]) == cli.OK
    assert "1 patterns, 2 cases each, seed 0" in (out := capsys.readouterr().out) and "no findings" in out


def test_check_reports_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from ascend_dynamo.report import check

    found = [Finding("gelu_add", "fuzz", "differs by 2", "x: f32[2]"), Finding("other", "lint", "not asked for")]
    monkeypatch.setattr(check, "lint", lambda registry: found[1:])
    monkeypatch.setattr(check, "fuzz", lambda p, **k: found[:1] if k["seed"] == 7 and len(k["among"]) > 5 else [])
    argv = ["patterns", "check", "--only", "gelu_add", "--seed", "7"]
    assert cli.main(argv) == cli.FOUND
    assert "gelu_add: fuzz: differs by 2 [x: f32[2]]\n" in (out := capsys.readouterr().out)
    assert "1 findings in 1 patterns" in out and "other" not in out
    assert cli.main([*argv, "--json"]) == cli.FOUND
    assert json.loads(capsys.readouterr().out)["findings"][0]["sentence"] == "differs by 2"


def test_a_pattern_of_a_class_is_described():
    class Own:
        """Not in a plugin."""

        name, version, level, benefit, users, anchors, eager = "own", 1, 2, 1, "refuse", (), ()
        emits = before = after = frozenset()
        domain = Domain()

    data = catalogue.describe(Own(), "here 1")
    assert data["file"].split(":")[0] == __file__ and data["summary"].startswith("The command line")
    assert catalogue.listing([]) == ["0 patterns from nowhere"]


def test_the_console_script_runs():
    done = subprocess.run(
        [sys.executable, "-m", "ascend_dynamo.cli", "-h"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "explain" in done.stdout


def test_patterns_check_tries_spellings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from ascend_dynamo.report import check

    monkeypatch.setattr(check, "lint", lambda registry: [])
    monkeypatch.setattr(check, "fuzz", lambda p, **k: [])
    argv = ["patterns", "check", "--only", "sdpa", "--spellings", "4", "--seed", "1"]
    assert cli.main(argv) == cli.OK
    assert "grammar attention: " in (out := capsys.readouterr().out) and "0 wrong" in out and "no findings" in out
    assert cli.main([*argv, "--json"]) == cli.OK
    (grammar,) = json.loads(capsys.readouterr().out)["grammars"]
    assert grammar["spellings"] == 4 and grammar["op"] == "flash_attention"
    with pytest.raises(SystemExit):
        cli.main([*argv[:-3], "-1"])
