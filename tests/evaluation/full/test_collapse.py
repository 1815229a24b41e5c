"""The shape of outputs by hand, and their perplexity and entropy against transformers' logits."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax import load_model
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.errors import UserError
from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.full.collapse import collapse, output_statistics


def test_shares_by_hand():
    prose = "Ada wrote letters to her friend by the sea."
    found = collapse([prose, "6 " * 40, "", "yes"], [False, True, False, False])
    assert (found["outputs"], found["degenerate"], found["empty"], found["hit_limit"]) == (4, 0.5, 0.25, 0.25)
    ratios = [len(zlib.compress(x.encode())) / len(x) for x in (prose, "6 " * 40, "yes")]
    assert found["zlib_ratio"] == pytest.approx(np.mean(ratios)) and ratios[1] < 0.2
    assert found["words"] == (9 + 40 + 0 + 1) / 4
    nothing = collapse([])
    assert (nothing["degenerate"], nothing["hit_limit"], nothing["zlib_ratio"], nothing["words"]) == (
        0,
        None,
        None,
        None,
    )
    json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match="hit_limit has 1 entries for 2 outputs"):
        collapse(["a", "b"], [True])


def test_perplexity_and_entropy_equal_transformers(tmp_path):
    outputs = [" in Rome by the sea", "", " wrote " * 20, " 1900"]
    rows = [Scored(f"r{i}", "Task1", f"Ada went to {i * 7}", "gold", out) for i, out in enumerate(outputs)]
    tokenizer = train_tokenizer([row.input + row.model_output for row in rows] * 2, 290)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, initializer_range=0.5, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    nll, entropy, cut = [], [], 0
    for row in rows:
        ids = lm.tokenizer(row.input + row.model_output)["input_ids"]
        cut += len(ids) > 32
        start = len(lm.tokenizer(row.input)["input_ids"])
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids[:32]])).logits[0].double(), dim=-1)
        for at in range(start, min(len(ids), 32)):
            nll.append(-float(log_p[at - 1, ids[at]]))
            entropy.append(-float((log_p[at - 1].exp() * log_p[at - 1]).sum()))
    assert cut == 1
    (found,) = output_statistics(lm.model, lm.params, None, lm.tokenizer, rows, batch_size=4)
    assert found["tokens"] == len(nll)
    assert found["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)
    assert found["entropy"] == pytest.approx(np.mean(entropy), rel=1e-4)
    assert 0.1 < found["entropy"] < math.log(len(tokenizer)) - 0.1
    (silent,) = output_statistics(lm.model, lm.params, None, lm.tokenizer, rows[1:2], batch_size=4)
    assert silent == {"tokens": 0, "nll": None, "perplexity": None, "entropy": None}
