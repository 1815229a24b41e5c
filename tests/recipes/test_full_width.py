"""OLMo-1B at its full width, of random weights and two layers, goes through a whole run on a CPU in little memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import yaml

from unlearnjax import save_model
from unlearnjax.data.rows import write_rows
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel

LAYERS, CANDIDATES = 2, 4
RECIPE = {
    "name": "wide",
    "defaults": {"epochs": 1, "micro_batch": 2, "accumulation": 1, "rank": 32, "objective": {"npo": 0.5, "gdr": 0.5}},
    "candidates": [{"name": f"c{i}", "learning_rate": 1e-4 * (i + 1)} for i in range(CANDIDATES)],
    "training": {"buckets": 1},
    "merges": [{"name": "ties", "method": "ties", "density": 0.5}],
    "evaluation": {"max_new_tokens": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_at_the_width_of_olmo_1b(world, tmp_path, dtype):
    small, corpus, _ = world
    config = ModelConfig(
        "olmo", 50304, 2048, 8192, LAYERS, 16, 16, 128, "layer", max_positions=512, clip_qkv=8.0,
        eos_token_ids=small.config.eos_token_ids, pad_token_id=small.config.pad_token_id,
    )  # fmt: skip
    model = build(config)
    params = init_params(model.abstract(jnp.bfloat16), jax.random.key(0))
    save_model(LanguageModel(params, config, small.tokenizer, model, "wide"), tmp_path / "base")
    del params
    for side in ("forget", "retain"):
        write_rows(tmp_path / f"{side}.jsonl", getattr(corpus, side)[:4])
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(RECIPE))
    # In a process of its own, whose memory is its own.
    program = (
        "import resource, sys; from unlearnjax.cli.main import main; status = main(sys.argv[1:]); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    command = [
        sys.executable, "-c", program, "run", "--model", str(tmp_path / "base"), "--forget",
        str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl"), "--recipe",
        str(tmp_path / "recipe.yml"), "--dtype", dtype, "--out", str(tmp_path / "out"), "--quiet",
    ]  # fmt: skip
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [c["status"] for c in report["candidates"]] == ["finished"] * CANDIDATES
    assert report["exported"] == "ties" and (tmp_path / "out" / "model" / "model.safetensors").exists()
    peak = int(done.stdout.rsplit("PEAK", 1)[1]) / 2**20
    weights = 2 if dtype == "bfloat16" else 4
    base = weights * (2 * 50304 * 2048 + LAYERS * (4 * 2048**2 + 3 * 2048 * 8192)) / 2**30
    states = 16 * CANDIDATES * 32 * LAYERS * (4 * 2 * 2048 + 3 * (2048 + 8192)) / 2**30
    print(f"{dtype}: peak {peak:.2f} GiB, base {base:.2f}, candidates and their optimizers {states:.2f}")
    assert peak < 7
