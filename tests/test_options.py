"""Options: validation, precedence, digest, and the documentation that lists them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_dynamo.cache.gears import Gears
from ascend_dynamo.errors import AscendDynamoError, OptionError
from ascend_dynamo.options import Options, markdown_table

PATTERN = SimpleNamespace(name="mine", match=lambda anchor, facts: None)


class FakeRegistry:
    """Iterable with a digest, as a Registry is."""

    def __iter__(self) -> Any:
        return iter((PATTERN,))

    def digest(self) -> str:
        return "0"


def resolve(environ: dict[str, str] | None = None, **options: Any) -> Options:
    return Options.resolve(None, options, environ or {})


def test_defaults() -> None:
    options = resolve()
    assert options == Options()
    assert (options.target, options.level, options.strict, options.cache, options.mode) == (
        "auto",
        2,
        False,
        True,
        None,
    )


@pytest.mark.parametrize("spelling", [3, "3", "O3", "o3"])
def test_levels_have_three_spellings(spelling: Any) -> None:
    assert resolve(level=spelling).level == 3


ILLEGAL: list[tuple[str, Any, str]] = [
    ("target", "gpu", "'auto', 'cpu', 'npu', 'reference'"),
    ("target", None, "'auto'"),
    ("level", 4, "'O0', 'O1', 'O2', 'O3'"),
    ("level", "fast", "'O3'"),
    ("level", True, "0, 1, 2, 3"),
    ("level", 2.0, "0, 1, 2, 3"),
    ("patterns", {"rms_norm": 1}, "True or False"),
    ("patterns", {7: True}, "pattern name"),
    ("patterns", ["-"], "a list of names"),
    ("patterns", 5, "a list of names"),
    ("patterns", [5], "Pattern or Registry objects"),
    ("plugins", "rms_norm", "Pattern or Registry objects"),
    ("plugins", [object()], "Pattern or Registry objects"),
    ("strict", "yes", "True or False"),
    ("validate", 1, "True or False"),
    ("expect", ["rms_norm"], "must fire"),
    ("expect", {"rms_norm": -1}, "must fire"),
    ("expect", {"rms_norm": True}, "must fire"),
    ("cache", "", "path of a directory"),
    ("cache", 3, "path of a directory"),
    ("gears", 8, "pow2"),
    ("gears", {"seq": "pow3"}, "pow2"),
    ("gears", {"seq": [0]}, "positive sizes"),
    ("gears", {1: [1]}, "name of a dimension"),
    ("dump", "", "path of a directory"),
    ("dump", 1, "path of a directory"),
    ("memory_limit", "8 apples", "8GB"),
    ("memory_limit", 0, "positive"),
    ("memory_limit", True, "positive"),
    ("mode", "max-autotune-no-cudagraph", 'did you mean "max-autotune-no-cudagraphs"'),
]


@pytest.mark.parametrize(("name", "value", "legal"), ILLEGAL)
def test_illegal_values_name_the_option_and_what_is_legal(name: str, value: Any, legal: str) -> None:
    with pytest.raises(OptionError) as error:
        resolve(**{name: value})
    assert legal in str(error.value)
    assert f'"{name}"' in str(error.value)


@given(st.text())
def test_any_unknown_name_is_an_option_error(name: str) -> None:
    if name not in {f.name for f in fields(Options)}:
        with pytest.raises(OptionError, match="there is no option"):
            Options.resolve(None, {name: 1}, {})


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(OptionError, match='no option "levle"; did you mean "level"'):
        resolve(levle=2)
    with pytest.raises(OptionError, match="known are arena, cache, dump"):
        resolve(qqqqq=2)
    with pytest.raises(OptionError, match='no option "stict"; did you mean "strict"'):
        Options().replace(stict=True)
    assert issubclass(OptionError, (AscendDynamoError, ValueError))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_torch(mode: str) -> None:
    assert Options.resolve(mode, None, {}).mode == mode


def test_explicit_over_environment_over_default() -> None:
    environ = {"ASCEND_DYNAMO_LEVEL": "O1", "ASCEND_DYNAMO_TARGET": "cpu", "ASCEND_DYNAMO_MODE": "default", "HOME": "/"}
    assert Options.resolve("max-autotune", {"level": 3}, environ) == Options(level=3, target="cpu", mode="max-autotune")
    assert Options.resolve(None, {}, environ).mode == "default"


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("STRICT", "1", "strict", True),
        ("STRICT", "off", "strict", False),
        ("VALIDATE", "TRUE", "validate", True),
        ("CACHE", "0", "cache", False),
        ("CACHE", "/tmp/cache", "cache", "/tmp/cache"),
        ("PATTERNS", "rms_norm, -merge_linears", "patterns", {"rms_norm": True, "merge_linears": False}),
        ("EXPECT", "rms_norm=4,rotary=2", "expect", {"rms_norm": 4, "rotary": 2}),
        ("EXPECT", '{"rms_norm": 4}', "expect", {"rms_norm": 4}),
        ("GEARS", '{"batch": [1, 2], "seq": "pow2"}', "gears", Gears.parse({"batch": [1, 2], "seq": "pow2"})),
        ("GEARS", "seq=pow2", "gears", Gears.parse({"seq": "pow2"})),
        ("DUMP", "out", "dump", "out"),
        ("DUMP", "", "dump", None),
        ("MEMORY_LIMIT", "1.5 GB", "memory_limit", 3 << 29),
        ("MEMORY_LIMIT", "4096", "memory_limit", 4096),
        ("MEMORY_LIMIT", "", "memory_limit", None),
    ],
)
def test_every_variable_is_read(variable: str, text: str, name: str, value: Any) -> None:
    assert getattr(resolve({f"ASCEND_DYNAMO_{variable}": text}), name) == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("LEVLE", "2", 'no variable ASCEND_DYNAMO_LEVLE; did you mean "LEVEL"'),
        ("LEVEL", "9", "from the environment variable ASCEND_DYNAMO_LEVEL"),
        ("STRICT", "maybe", "True or False"),
        ("GEARS", "{", "JSON"),
    ],
)
def test_wrong_variables_are_refused_and_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        resolve({f"ASCEND_DYNAMO_{variable}": text})
    assert message in str(error.value)


def test_the_log_variable_is_not_an_option() -> None:
    for variable in ("LOGS", "CACHE_DIR", "CPU_ISA"):
        assert resolve({f"ASCEND_DYNAMO_{variable}": "+match"}) == Options()


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_DYNAMO_LEVEL", "O0")
    assert Options.resolve().level == 0


def test_strict_validates_unless_told_otherwise() -> None:
    assert resolve(strict=True).validate
    assert not resolve(strict=True, validate=False).validate
    assert not resolve(strict=False).validate


def test_patterns_by_name() -> None:
    options = resolve(patterns=["rms_norm", "-rotary"])
    assert options.patterns == {"rms_norm": True, "rotary": False}
    assert options.enabled("rms_norm") and options.enabled("other") and not options.enabled("rotary")
    only = resolve(patterns={"*": False, "rms_norm": True})
    assert only.enabled("rms_norm") and not only.enabled("other")
    assert resolve(patterns="-rotary").patterns == {"rotary": False}


def test_pattern_objects_move_to_plugins() -> None:
    registry = FakeRegistry()
    options = resolve(patterns=["-rotary", PATTERN, registry], plugins=[PATTERN])
    assert options.patterns == {"rotary": False}
    assert options.plugins == (PATTERN, PATTERN, registry)
    assert resolve(patterns=registry).plugins == (registry,)
    assert resolve(patterns=PATTERN).plugins == (PATTERN,)
    assert resolve(plugins=registry).plugins == (registry,)
    assert resolve(plugins=PATTERN).plugins == (PATTERN,)


def test_names_are_checked_against_the_registry() -> None:
    known = {"rms_norm": ("by_hand", "aten"), "by_hand": ("by_hand",), "aten": ("aten",), "rotary": ("rotary",)}
    resolve(patterns={"*": False, "rotary": True}, expect={"rms_norm": 1}).for_patterns(known)
    with pytest.raises(OptionError, match='option "patterns": no pattern is named "rotray"; did you mean "rotary"'):
        resolve(patterns="-rotray").for_patterns(known)
    with pytest.raises(OptionError, match='option "expect": no pattern is named "flash"'):
        resolve(expect={"flash": 1}).for_patterns(known)


def test_the_name_of_an_op_speaks_for_all_patterns_that_emit_it() -> None:
    known = {"rms_norm": ("by_hand", "aten"), "by_hand": ("by_hand",), "aten": ("aten",)}
    off = resolve(patterns="-rms_norm").for_patterns(known)
    assert not off.enabled("by_hand") and not off.enabled("aten")
    one = resolve(patterns={"rms_norm": False, "aten": True}).for_patterns(known)
    assert not one.enabled("by_hand") and one.enabled("aten")


def test_options_are_immutable_values() -> None:
    options = resolve(patterns=["-a"], expect={"b": 1}, gears={"seq": "pow2"}, dump=Path("d"), cache=Path("c"))
    assert (options.dump, options.cache) == ("d", "c")
    with pytest.raises(FrozenInstanceError):
        options.level = 1  # type: ignore[misc]
    for change in ("update", "pop", "clear"):
        with pytest.raises(TypeError, match="immutable"):
            getattr(options.patterns, change)({})
    for twin in (copy.deepcopy(options), pickle.loads(pickle.dumps(options)), options.replace()):
        assert twin == options and hash(twin) == hash(options) and twin.digest() == options.digest()
    assert options.replace(level="O3").level == 3
    with pytest.raises(OptionError):
        options.replace(level=9)


def test_arena_is_a_word_or_a_truth_value() -> None:
    assert [resolve(arena=v).arena for v in (True, False, "on", "poison")] == ["on", "off", "on", "poison"]
    assert [resolve({"ASCEND_DYNAMO_ARENA": v}).arena for v in ("0", "on", "poison")] == ["off", "on", "poison"]
    with pytest.raises(OptionError, match=r"'poisson'.*did you mean .poison."):
        resolve(arena="poisson")
    with pytest.raises(OptionError, match="'on', 'off', 'poison'"):
        resolve(arena=1)


CHANGES: dict[str, Any] = {
    "target": "cpu",
    "level": 1,
    "patterns": ["-rotary"],
    "plugins": [PATTERN],
    "strict": True,
    "validate": True,
    "expect": {"rotary": 1},
    "gears": {"seq": "pow2"},
    "mode": "max-autotune",
}


def test_digest_sees_every_option_that_matters_and_no_other() -> None:
    digests = {name: resolve(**{name: value}).digest() for name, value in CHANGES.items()}
    assert len({*digests.values(), Options().digest()}) == len(CHANGES) + 1
    assert resolve(arena="off", cache=False, dump="d", memory_limit="8GB").digest() == Options().digest()
    assert {*CHANGES, "arena", "cache", "dump", "memory_limit"} == {f.name for f in fields(Options)}
    assert resolve(patterns={"a": True, "b": False}).digest() == resolve(patterns={"b": False, "a": True}).digest()


def test_the_documentation_lists_every_option_as_it_is() -> None:
    page = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    for f in fields(Options):
        assert f"`{f.name}`" in page
    assert markdown_table() in page, "docs/options.md is stale: put markdown_table() of ascend_dynamo.options there"
