"""A model whose weights were merged saves and loads like any other."""

import torch
import transformers

import ascend_dynamo


@torch.no_grad()
def test_save_pretrained_after_merging(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    torch.compiler.reset()
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 7))
    expected = model(ids, use_cache=False).logits
    backend = ascend_dynamo.Backend({"target": "reference"})
    torch.testing.assert_close(torch.compile(model, backend=backend)(ids, use_cache=False).logits, expected)
    assert backend.records[0].count("merge_linears") == 2
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.weight.untyped_storage().data_ptr() == layer.k_proj.weight.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    again = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, use_cache=False).logits, expected)
    assert again.lm_head.weight is again.model.embed_tokens.weight
