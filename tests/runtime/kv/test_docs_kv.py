"""The examples of docs/kv.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from kv_models import generate, model_of, prompt

from ascend_dynamo import hf

PAGE = (Path(__file__).parents[3] / "docs" / "kv.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def test_generate_as_shown(monkeypatch):
    model = model_of("tiny-qwen3", 1)
    ids = prompt(model, 2, 9)
    plain = hf.compile_config
    monkeypatch.setattr(hf, "compile_config", lambda: plain(target="reference"))
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    names = {"model": model, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exec(BLOCKS[0], names)
    assert names["cache"].get_seq_length() == 0  # reset at the end


def test_serving_as_shown():
    model = model_of("tiny-qwen3")
    tokens = prompt(model, 1, 9)[0].tolist()
    other = "second = requests.open([5, 6]); requests.commit(requests.step({second: [5, 6]})); token = 7\nbatch ="
    source = BLOCKS[1].replace('memory="4GB"', 'memory="4MB"').replace("batch =", other, 1)
    names = {"model": model, "prompt": tokens, "hf": hf}
    with torch.no_grad():
        exec(source, names)
        alone = model(torch.tensor([tokens])).logits[0, -1]
    assert names["logits"].shape[:2] == (1, 2)
    torch.testing.assert_close(names["logits"][0, 0], alone, rtol=1e-3, atol=1e-4)
    assert torch.equal(generate(model, prompt(model, 1, 3), None, 2)[:, :3], prompt(model, 1, 3))
