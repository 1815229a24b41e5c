"""The experiments' small CLIP: its loss against loops, its tokenizer after a round trip."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = str(Path(__file__).parents[2] / "experiments")


@pytest.fixture
def clip(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import _clip

    yield _clip
    sys.modules.pop("_clip")


def test_the_contrastive_loss_is_what_it_says(clip):
    rng = np.random.default_rng(0)
    s, classes = rng.normal(size=(6, 6)), np.array([0, 1, 0, 2, 1, 0])
    total = 0.0
    for scores in (s, s.T):
        for i in range(6):
            log_p = scores[i] - np.log(np.exp(scores[i]).sum())
            total -= log_p[classes == classes[i]].mean() / 12
    same = jnp.asarray(classes[:, None] == classes)
    assert float(clip.contrastive(jnp.asarray(s, jnp.float32), same)) == pytest.approx(total, rel=1e-5)


def test_every_text_ends_with_the_end_token_after_a_round_trip(clip, tmp_path):
    from unlearnjax.data.bpe import train_tokenizer
    from unlearnjax.io.huggingface import load_tokenizer

    texts = ["a photo of a cat.", "7"]
    made = clip._with_end(train_tokenizer(texts, 270))
    made.save_pretrained(str(tmp_path))
    found = load_tokenizer(tmp_path)(texts, padding=True)["input_ids"]
    assert found == made(texts, padding=True)["input_ids"]
    assert all(made.eos_token_id in row for row in found)
    assert found[1][1] == made.eos_token_id and set(found[1][2:]) == {made.pad_token_id}
