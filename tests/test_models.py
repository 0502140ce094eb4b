"""The models of the benchmarks and tests are reproducible, and their random weights notice their context."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _models

CAUSAL = [n for n in _models.names("tiny") if _models.SPECS[n].causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_tiny_models_notice_every_planted_fault(name: str):
    model = _models.build(name, dtype=torch.float32, check=False)
    _models.assert_context_sensitive(model)
    assert model.config.num_hidden_layers == 2


def test_a_family_keeps_its_own_dtype_and_attention():
    model = _models.build("tiny-qwen3", attention="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (_models.build("tiny-bert", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_initialisation_is_only_skipped_while_building():
    _models.build("tiny-bert")
    assert torch.nn.Linear(64, 64).weight.std() > 0.01
    t = torch.zeros(100)
    assert torch.nn.init.normal_(t).std() > 0.1


def test_a_model_that_ignores_its_context_is_refused():
    model = _models.build("tiny-llama", dtype=torch.float32, check=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(AssertionError, match=r"llama (says only|does not notice)"):
        _models.assert_context_sensitive(model)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match=r"no model 'gpt9'.*qwen3-0.6b"):
        _models.build("gpt9")


def test_real_sizes_are_those_of_the_released_models():
    config = _models.SPECS["qwen3-0.6b"].config
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"]) == (28, 1024, 128)
    assert config["vocab_size"] == 151936 and config["tie_word_embeddings"]
    ds3 = _models.SPECS["ds3-small"].config
    assert (ds3["q_lora_rank"], ds3["kv_lora_rank"], ds3["qk_rope_head_dim"]) == (384, 512, 64)


def test_layers_can_be_cut():
    assert _models.build("qwen3-0.6b", layers=1, check=False).config.num_hidden_layers == 1


def test_the_pretrained_sentence_model_knows_meaning():
    model, tokenizer = _models.minilm()
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    v = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert v[0] @ v[1] > 0.4 > v[0] @ v[2]
