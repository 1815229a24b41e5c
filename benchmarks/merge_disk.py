"""Merging model folders from disk to disk: `unlearnjax merge` as a user calls it, start-up and compiling included.

    python benchmarks/merge_disk.py --mergekit ENV/bin/mergekit-yaml --out benchmarks/results/merge_disk_cpu.json
    python benchmarks/merge_disk.py --case vit --out benchmarks/results/merge_disk_vit_cpu.json

Cases:

- llama: four models of 134M parameters in bfloat16 (SmolLM-135M's shape, written by transformers) and their base;
  TIES, linear and consensus, beside mergekit's own TIES of the same YAML. The files are in the page cache.
- vit: NegMerge's: `--models` (30) of 113M parameters in float32 (13.6 GB) and their base. Consensus, linear and TIES
  (each tensor's own thresholds, and the paper's, which are the whole model's), each beside `cat` of the same files to
  /dev/null, page cache dropped before both.

Each program is a process of its own; its wall-clock time and the most memory it held (VmHWM, mapped file pages
included) are what the kernel says of it. Jobs take their laps in turn; ratios are lap by lap.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common as bench

VIT = {  # CLIP ViT-B/32's image tower, and its token embedding: 113.2M parameters
    "token_embedding.weight": (49408, 512), "class_embedding": (768,), "conv1.weight": (768, 3, 32, 32),
    "positional_embedding": (50, 768), "ln_pre.weight": (768,), "ln_pre.bias": (768,), "ln_post.weight": (768,),
    "ln_post.bias": (768,), "proj": (768, 512),
}  # fmt: skip
for _layer in range(12):
    for _name, _shape in {
        "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,), "attn.out_proj.weight": (768, 768),
        "attn.out_proj.bias": (768,), "ln_1.weight": (768,), "ln_1.bias": (768,), "ln_2.weight": (768,),
        "ln_2.bias": (768,), "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,),
    }.items():  # fmt: skip
        VIT[f"resblocks.{_layer}.{_name}"] = _shape


def write_llamas(folder: Path, count: int) -> None:
    """A base and fine-tunes of it, random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    start = {name: x.clone() for name, x in model.state_dict().items()}
    for i in range(count):
        model.load_state_dict({k: x + 0.01 * torch.randn(x.shape).to(torch.bfloat16) for k, x in start.items()})
        model.save_pretrained(folder / f"model{i}")


def write_vits(folder: Path, count: int) -> None:
    """Random task vectors on a base of zeros: the values do not matter, their signs are random."""
    import numpy as np

    from unlearnjax.io.safetensors import Entry, write_file

    for i in range(-1, count):
        name = "base" if i < 0 else f"model{i}"
        draw = np.random.default_rng(i + 1)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
        entries = [
            Entry(key, shape, np.float32, lambda shape=shape, draw=draw: draw.standard_normal(shape, np.float32))
            for key, shape in VIT.items()
        ]
        write_file(folder / name / "model.safetensors", entries)


def sources(folder: Path, count: int) -> list[Path]:
    return [folder / "base", *(folder / f"model{i}" for i in range(count))]


def drop(folders: Sequence[Path]) -> None:
    """Out of the page cache, so that the next reader goes to the disk."""
    for path in (p for f in folders for p in f.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: Sequence[str], out: Path | None, env: dict[str, str] | None = None) -> dict[str, float]:
    """Run a program to its end: its seconds and the most memory it held, in MiB."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile() as said:
        null = os.open(os.devnull, os.O_WRONLY)
        begin = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        pid = os.posix_spawnp(command[0], list(command), {**os.environ, **(env or {})}, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - begin
        os.close(null)
        if status:
            said.seek(0)
            raise SystemExit(f"benchmark: {' '.join(command)} failed: {said.read().decode()[-2000:]}")
    return {"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}


def ours(folder: Path, count: int, out: Path, method: str, *more: str) -> list[str]:
    base, *models = map(str, sources(folder, count))
    return [sys.executable, "-m", "unlearnjax.cli.main", "merge", "--quiet", "--base", base, "--models", *models,
            "--method", method, *more, "--out", str(out)]  # fmt: skip


def jobs(a: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], Path | None]]:
    out = folder / "out"
    count = a.models
    if a.case == "llama":
        recipe = folder / "ties.yml"
        models = "".join(f"  - model: {folder}/model{i}\n    parameters: {{weight: 1.0}}\n" for i in range(count))
        recipe.write_text(
            f"models:\n{models}merge_method: ties\nbase_model: {folder}/base\n"
            "parameters: {density: 0.5, normalize: true}\ndtype: bfloat16\n"
        )
        ties = [sys.executable, "-m", "unlearnjax.cli.main", "merge", "--quiet", str(recipe), "--out", str(out)]
        found = {
            "ties (mergekit's)": ties,
            "linear": ours(folder, count, out, "linear"),
            "consensus": ours(folder, count, out, "consensus"),
            "ties (paper's)": ours(folder, count, out, "ties", "--density", "0.5"),
        }
        if a.mergekit is not None:
            flags = ["--no-write-model-card", "--no-copy-tokenizer"]
            found["mergekit ties"] = [a.mergekit, str(recipe), str(out), *flags]
        return {name: (command, out) for name, command in found.items()}
    files = [str(p / "model.safetensors") for p in sources(folder, count)]
    return {
        "cat": (["cat", *files], None),
        "consensus": (ours(folder, count, out, "consensus"), out),
        "linear": (ours(folder, count, out, "linear"), out),
        "ties (each tensor's)": (ours(folder, count, out, "ties", "--density", "0.2", "--semantics", "peft"), out),
        "ties (paper's)": (ours(folder, count, out, "ties", "--density", "0.2"), out),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--case", choices=("llama", "vit"), default="llama")
    p.add_argument("--models", type=int, help="how many; default: 4 of llama, 30 of vit")
    p.add_argument("--mergekit", help="the mergekit-yaml of an environment that has it (`make peers`)")
    p.add_argument("--work", help="where the models are written (and removed); default: the temporary folder")
    p.add_argument("--laps", type=int, default=3)
    p.add_argument("--only", nargs="+", help="of the jobs, these")
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    a.models = a.models or (4 if a.case == "llama" else 30)
    with tempfile.TemporaryDirectory(dir=a.work) as work:
        folder = Path(work)
        bench.in_child(write_llamas if a.case == "llama" else write_vits, folder, a.models)
        size = sum(p.stat().st_size for f in sources(folder, a.models) for p in f.glob("*.safetensors"))
        wanted = {name: job for name, job in jobs(a, folder).items() if a.only is None or name in a.only}
        laps: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
        for lap in range(a.laps):
            for name, (command, out) in wanted.items():
                if a.case == "vit":
                    drop(sources(folder, a.models))
                laps[name].append(timed(command, out))
                bench._note(f"lap {lap + 1}: {name}: {laps[name][-1]}")
        seconds = {name: [lap["seconds"] for lap in mine] for name, mine in laps.items()}
        against = {"llama": "mergekit ties", "vit": "cat"}[a.case]
        result: dict[str, Any] = {
            "benchmark": "merge_disk",
            "case": a.case,
            "models": a.models,
            "bytes_read": size,
            "hardware": bench.in_child(bench.hardware),
            "jobs": {
                name: {
                    "seconds": bench.spread(mine),
                    "peak_mib": bench.spread([lap["peak_mib"] for lap in laps[name]]),
                    "gb_per_second": bench.spread([size / x / 1e9 for x in mine]),
                    **({f"over_{against}": bench.ratio(mine, seconds[against])} if against in seconds else {}),
                }
                for name, mine in seconds.items()
            },
        }
        for name, job in result["jobs"].items():
            bench.emit({"job": name, **job})
        bench.write(a.out, result)


if __name__ == "__main__":
    main()
