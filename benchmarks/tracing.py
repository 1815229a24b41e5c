"""Causal tracing: all restorations of many facts in one program, against the obvious loop in torch (a hook, and one
forward pass per restoration, as ROME's and Selective Amnesia's code), on the same weights with the same noise.

    python benchmarks/tracing.py --out benchmarks/results/tracing_cpu.json

A decoder of OLMo's kind with random weights; 24 made-up facts of 8 to 15 tokens with subjects of 2 to 4; hidden states,
MLP and attention at every token and layer, 10 draws of noise. Each side is a process of its own; they take turns, lap
by lap. Reported: facts per second (without compiling, whose time is given too), the ratio, and how far the scores are
apart, which must be less than 1e-4.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common as bench

DRAWS, WINDOW, SIGMA = 10, 4, 0.6
KINDS = ("hidden", "mlp", "attention")


def made(folder: str, vocabulary: int, layers: int, hidden: int) -> None:
    """Write the model, as transformers writes it."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = OlmoForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10)  # a fresh model says nearly the same of everything, and all scores would be alike
    model.save_pretrained(folder)


def facts(count: int, vocabulary: int) -> list[tuple[list[int], int, int]]:
    """(ids, where the subject begins, where it ends)."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        begin, subject, after = rng.integers(2, 5), rng.integers(2, 5), rng.integers(4, 7)
        ids = rng.integers(3, vocabulary, begin + subject + after).tolist()
        found.append((ids, int(begin), int(begin + subject)))
    return found


def drawn(hidden: int, width: int) -> Any:
    import numpy as np

    return (SIGMA * np.random.RandomState(1).randn(DRAWS, width, hidden)).astype(np.float32)


def ours(folder: str, count: int) -> tuple[dict[str, Any], Callable[[str], Any]]:
    import jax
    import numpy as np

    from unlearnjax.models.language_model import load_model
    from unlearnjax.tracing.facts import Fact
    from unlearnjax.tracing.tokens import Located
    from unlearnjax.tracing.trace import Settings, Tracer

    lm = load_model(folder)

    class Ids:  # a tokenizer, as far as a tracer asks: the facts are ids already
        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[3, 4] for _ in texts]}

        def decode(self, ids: list[int]) -> str:
            return str(ids[0])

    lm = dataclasses.replace(lm, tokenizer=Ids())
    own = [Located(Fact(str(i), "", "", None), ids, begin, end, frozenset(), frozenset())
           for i, (ids, begin, end) in enumerate(facts(count, lm.config.vocab_size))]  # fmt: skip
    tracer = Tracer(lm, own, Settings(KINDS, WINDOW, 1.0, DRAWS))
    tracer.sigma = SIGMA
    groups = tracer.groups(range(count))

    def lap() -> float:
        begin = time.perf_counter()
        found = {place: t for group in groups for place, t in zip(group.places, tracer.run(group), strict=True)}
        seconds = time.perf_counter() - begin
        lap.found = [found[i] for i in range(count)]  # type: ignore[attr-defined]
        return count / seconds

    begin = time.perf_counter()
    lap()
    first = time.perf_counter() - begin

    def after() -> dict[str, Any]:
        scores = [np.concatenate([t.restored[k].ravel() for k in KINDS]).tolist() for t in lap.found]  # type: ignore[attr-defined]
        return {"scores": scores, **bench.memory(bench.jax_peak_mib())}

    about = {"first_call_seconds": first, "programs": len({(g.before, g.rest, g.many) for g in groups}),
             "calls": len(groups), "device": jax.devices()[0].device_kind}  # fmt: skip
    return about, bench.answers(lap, after)


def theirs(folder: str, count: int) -> tuple[dict[str, Any], Callable[[str], Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    own = facts(count, model.config.vocab_size)
    sites = {
        "hidden": lambda layer: model.model.layers[layer],
        "mlp": lambda layer: model.model.layers[layer].mlp,
        "attention": lambda layer: model.model.layers[layer].self_attn,
    }

    def forward(batch: Any, noise: Any, begin: int, end: int, hooked: list[Any], token: int) -> Any:
        def corrupt(_: Any, __: Any, out: Any) -> Any:
            out = out.clone()
            out[1:, begin:end] += noise
            return out

        def restore(_: Any, __: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            first[1:, token] = first[0, token]
            return out

        hooks = [model.model.embed_tokens.register_forward_hook(corrupt)]
        hooks += [site.register_forward_hook(restore) for site in hooked]
        with torch.no_grad():
            last = torch.softmax(model(batch).logits[:, -1], dim=-1)
        for hook in hooks:
            hook.remove()
        return last

    def traced(ids: list[int], begin: int, end: int) -> list[float]:
        batch = torch.tensor([ids] * (DRAWS + 1), device=device)
        noise = torch.from_numpy(drawn(hidden, end - begin)).to(device)
        word = int(forward(batch, noise, begin, end, [], 0)[0].argmax())
        scores = []
        for kind in KINDS:
            for token in range(len(ids)):
                for layer in range(layers):
                    low, high = (layer, layer + 1)
                    if kind != "hidden":
                        low, high = max(0, layer - WINDOW // 2), min(layers, layer + (WINDOW + 1) // 2)
                    hooked = [sites[kind](at) for at in range(low, high)]
                    scores.append(float(forward(batch, noise, begin, end, hooked, token)[1:, word].mean()))
        return scores

    def lap() -> float:
        begin = time.perf_counter()
        lap.found = [traced(*fact) for fact in own]  # type: ignore[attr-defined]
        return count / (time.perf_counter() - begin)

    traced(*own[0])

    def after() -> dict[str, Any]:
        return {"scores": lap.found, **bench.memory()}  # type: ignore[attr-defined]

    return {"threads": torch.get_num_threads(), "device": device}, bench.answers(lap, after)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--vocabularies", type=int, nargs="+", default=[6600, 50304])
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--facts", type=int, default=24)
    p.add_argument("--laps", type=int, default=3)
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    result: dict[str, Any] = {"benchmark": "tracing", "hardware": bench.in_child(bench.hardware), "layers": a.layers,
                              "hidden": a.hidden, "facts": a.facts, "cases": []}  # fmt: skip
    for vocabulary in a.vocabularies:
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(Path(temporary) / "model")
            bench.in_child(made, folder, vocabulary, a.layers, a.hidden)
            jobs: dict[str, Any] = {"ours": (ours, (folder, a.facts)), "torch": (theirs, (folder, a.facts))}
            done = bench.measure(jobs, a.laps, together=result["hardware"]["platform"] == "cpu")
        pairs = zip(done["ours"].after["scores"], done["torch"].after["scores"], strict=True)
        apart = max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))
        for name, one in done.items():
            line = {"vocabulary": vocabulary, "side": name, "facts_per_second": bench.spread(one.laps), **one.info,
                    "over_torch": bench.ratio(one.laps, done["torch"].laps), "largest_score_difference": apart,
                    **{k: v for k, v in one.after.items() if k != "scores"}}  # fmt: skip
            bench.emit(line)
            result["cases"].append(line)
        if not apart < 1e-4:
            raise SystemExit(f"vocabulary {vocabulary}: scores differ from torch's by {apart}")
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
