"""generate() of a small Qwen3 really compiles, and gives eager's tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import CompileConfig, Qwen3Config

from ascend_dynamo import hf
from ascend_dynamo.backend import Backend
from ascend_dynamo.errors import AscendDynamoError, OptionError


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def generate(model: Any, config: CompileConfig | None) -> torch.Tensor:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    return model.generate(
        prompt,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation="static",
        compile_config=config,
    )


def test_generate_compiles_once_and_agrees_with_eager(model: transformers.PreTrainedModel) -> None:
    expected = generate(model, None)
    assert len(set(expected[0, 5:].tolist())) > 2
    config = hf.compile_config(target="reference")
    with hf.assert_compiled(config):
        assert torch.equal(generate(model, config), expected)
    with hf.assert_compiled(config, graphs=0):  # a fresh cache, the same code
        assert torch.equal(generate(model, config), expected)
    assert hf.compile_count(config) == 1


def test_falling_back_to_eager_is_an_error_that_says_why(model: transformers.PreTrainedModel) -> None:
    config = hf.compile_config(target="reference")
    config._compile_all_devices = None
    reason = r"at least one graph.*cache_implementation='static'"
    with pytest.raises(AscendDynamoError, match=reason), hf.assert_compiled(config):
        generate(model, config)


def test_the_wrong_number_of_graphs_is_an_error() -> None:
    config = hf.compile_config(target="reference")
    reason = r"expected 2 graphs to be compiled, but 1 were$"
    with pytest.raises(AscendDynamoError, match=reason), hf.assert_compiled(config, graphs=2), torch.no_grad():
        torch.compile(torch.sin, backend=config.backend)(torch.ones(2))


def test_the_backend_survives_the_copies_that_generate_makes() -> None:
    config = hf.compile_config(level="O1", dynamic=True, fullgraph=True, mode="reduce-overhead")
    assert config.to_dict()["backend"] is config.backend
    assert copy.deepcopy(config) == config
    assert (config.dynamic, config.fullgraph, config.mode) == (True, True, "reduce-overhead")


def test_a_ready_backend_is_taken_as_it_is() -> None:
    backend = Backend({"level": 1})
    assert hf.compile_config(backend=backend).backend is backend
    by_name = hf.compile_config(backend="ascend_opt")
    assert (by_name.backend, by_name.mode) == ("ascend_opt", None)
    with pytest.raises(TypeError, match="keeps no records"):
        hf.compile_count(by_name)
    with pytest.raises(OptionError, match="give the options level to the backend"):
        hf.compile_config(backend=backend, level=2)
    with pytest.raises(OptionError, match='no option "levle"'):
        hf.compile_config(levle=2)
