"""``make demo``: real models through ``torch.compile(model, backend="ascend_opt")`` on the machine you are at.

Three parts, each of which checks itself and fails loudly: a pretrained sentence embedder that must find the same
neighbours as eager; Qwen3 and DeepSeek-V3 from their Hugging Face classes, generating the same tokens as eager; and a
table of what was fused and how fast it runs against eager and stock Inductor.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ascend_dynamo
from ascend_dynamo import hf
from ascend_dynamo.report.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import _models as models

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Stock markets fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "She boiled the pasta for nine minutes.",
    "He cooked spaghetti until it was al dente.",
    "The compiler fuses small kernels into large ones.",
    "Operator fusion reduces the number of kernel launches.",
    "Rain is expected over the northern hills tonight.",
    "Forecasters predict showers in the north this evening.",
    "The violinist tuned her instrument before the concert.",
    "Ahead of the performance, the musician adjusted her strings.",
)
NEW_TOKENS = 24
LAYERS = 4


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@torch.no_grad()
def embedder(progress: Progress) -> dict[str, Any]:
    """MiniLM on real sentences: the nearest neighbour of each must be the one that eager finds."""
    model, tokenizer = models.minilm()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    backend = ascend_dynamo.Backend()
    compiled = torch.compile(model, backend=backend)
    runs = {"eager": model, "inductor": torch.compile(model), "ascend_opt": compiled}

    def neighbours(run: Callable[..., Any]) -> list[int]:
        hidden = run(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        return (mean @ mean.T).fill_diagonal_(-1).argmax(1).tolist()

    expected = neighbours(model)
    for name, run in runs.items():
        assert neighbours(run) == expected, f"{name} finds other neighbours"
        torch.compiler.reset() if name == "inductor" else None
        progress.step(f"MiniLM, {name}")
    assert backend.records, "nothing was compiled"
    found = [(SENTENCES[i], SENTENCES[j]) for i, j in enumerate(expected)]
    times = {name: _median(lambda run=run: run(**batch)) for name, run in runs.items()}
    return {"name": "MiniLM (pretrained)", "records": backend.records, "times": times, "neighbours": found}


@torch.no_grad()
def generator(name: str, title: str, progress: Progress) -> dict[str, Any]:
    """Greedy ``generate()`` with a static cache, in fp32: eager's tokens, twice, with fresh caches."""
    model = models.build(name, dtype=torch.float32, layers=LAYERS)
    progress.step(f"{title}: weights, context-sensitive")
    prompt = models.token_ids(model.config.vocab_size, 1, 32)

    def tokens(**more: Any) -> list[int]:
        out = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static", **more)
        return out[0, prompt.shape[1] :].tolist()

    expected = tokens(disable_compile=True)
    assert len(set(expected)) >= 8, "a model that repeats itself proves nothing"
    progress.step(f"{title}: eager")
    config = hf.compile_config()
    backend = config.backend
    assert tokens(compile_config=config) == expected, f"{title}: other tokens than eager"
    compiles = len(backend.records)
    progress.step(f"{title}: compiled")
    assert tokens(compile_config=config) == expected, f"{title}: other tokens with a second cache"
    assert compiles == len(backend.records), "the second cache led to another compilation"
    hf.assert_compiled(config)
    progress.step(f"{title}: a second cache, no new graph")
    times = {
        "eager": _median(lambda: tokens(disable_compile=True), repeats=3) / NEW_TOKENS,
        "ascend_opt": _median(lambda: tokens(compile_config=config), repeats=3) / NEW_TOKENS,
    }
    model._compiled_call = None  # transformers keeps the compiled forward on the model
    torch.compiler.reset()
    stock = hf.compile_config()
    stock.backend = "inductor"
    assert tokens(compile_config=stock) == expected
    times["inductor"] = _median(lambda: tokens(compile_config=stock), repeats=3) / NEW_TOKENS
    progress.step(f"{title}: Inductor")
    return {"name": title, "records": backend.records, "times": times, "tokens": expected}


def _median(run: Callable[[], Any], repeats: int = 9) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def report(result: dict[str, Any]) -> None:
    fired: Counter[str] = Counter(f.pattern for r in result["records"] for f in r.fired)
    before = sum(r.nodes_before for r in result["records"])
    after = sum(r.nodes_after for r in result["records"])
    times = result["times"]
    say(f"\n{result['name']}: {len(result['records'])} graph(s), {before} -> {after} calls")
    say("  fused: " + ", ".join(f"{name} x{n}" for name, n in sorted(fired.items())))
    speed = "  ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items())
    say(f"  {speed}   ({times['eager'] / times['ascend_opt']:.2f}x eager, "
        f"{times['inductor'] / times['ascend_opt']:.2f}x Inductor)")  # fmt: skip
    for a, b in result.get("neighbours", ())[:3]:
        say(f"    {a!r} is nearest to {b!r}")
    if "tokens" in result:
        say(f"    tokens as eager: {result['tokens'][:12]} ...")


def main() -> None:
    torch.manual_seed(0)
    with Progress(13, "demo") as progress:
        results = [
            embedder(progress),
            generator("tiny-qwen3", f"Qwen3 ({LAYERS} layers, random weights)", progress),
            generator("tiny-ds3", f"DeepSeek-V3 ({LAYERS} layers, random weights)", progress),
        ]
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, target {results[0]['records'][0].target}; "
        "rough medians of one process, see benchmarks/latency.py for careful ones")  # fmt: skip
    for result in results:
        report(result)
    say("\nEvery result above equals eager's. OK")


if __name__ == "__main__":
    main()
