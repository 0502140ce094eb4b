"""NPUConfig: the names of the Ascend tutorials on top of our options."""

from __future__ import annotations

import copy
import pickle

import pytest

from ascend_dynamo.compat import NPUConfig
from ascend_dynamo.errors import OptionError
from ascend_dynamo.options import Options


def test_as_in_the_tutorials() -> None:
    options = NPUConfig().set_options(fuse_enable=True, fuse_level="O3").to_options()
    assert options == {"level": 3}
    assert Options.resolve(None, options, {}).level == 3


def test_fusion_off_is_level_0_and_keeps_the_level_for_later() -> None:
    config = NPUConfig(fuse_enable=False, fuse_level=3)
    assert config.to_options() == {"level": 0}
    config.fuse_enable = True
    assert config.to_options() == {"level": 3}


def test_attributes_items_and_mappings_are_the_same() -> None:
    by_attribute, by_item = NPUConfig(), NPUConfig()
    by_attribute.fuse_level = "O1"
    by_attribute.target = "cpu"
    by_item["fuse_level"] = "O1"
    by_item["target"] = "cpu"
    assert by_attribute == by_item == NPUConfig({"fuse_level": 1, "target": "cpu"})
    assert by_item["target"] == by_item.target == "cpu"
    assert by_item.strict is False  # not set: the default
    assert by_item.to_options() == {"level": 1, "target": "cpu"}
    assert list(by_item) == ["fuse_enable", "fuse_level", "target"]
    assert by_item != "cpu"
    assert repr(by_item) == "NPUConfig(fuse_enable=True, fuse_level=1, target='cpu')"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match='"fuse_levle"; did you mean "fuse_level"'):
        NPUConfig().set_options(fuse_levle="O3")
    with pytest.raises(OptionError, match='did you mean "fuse_level"'):
        NPUConfig(level=2)
    with pytest.raises(AttributeError, match='did you mean "fuse_enable"'):
        _ = NPUConfig().fuse_enabel
    with pytest.raises(KeyError, match="did you mean"):
        NPUConfig()["tarket"]


def test_illegal_values_are_refused_when_set_and_change_nothing() -> None:
    config = NPUConfig(fuse_level="O1")
    for wrong in ({"fuse_level": "O7"}, {"fuse_enable": "yes"}, {"target": "gpu"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            config.set_options({"strict": True, **wrong})
    assert config.to_options() == {"level": 1}


def test_copies_are_independent() -> None:
    config = NPUConfig(fuse_level=1)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        twin.fuse_level = 3
        assert config.fuse_level == 1
