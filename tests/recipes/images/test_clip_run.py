"""The whole job on a small random CLIP: a data set of its own or a class is forgotten; what is written and refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from tests.recipes.images.conftest import NAMES, stripes, write
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.errors import UserError
from unlearnjax.models.vision.clip import CLIPConfig, Tower, normed
from unlearnjax.models.vision.clip_model import load_clip, new_clip, save_clip
from unlearnjax.models.vision.net import IMAGE_SIDE, clip_subject
from unlearnjax.recipes.images.data import ImageSources
from unlearnjax.recipes.images.parse import image_recipe_from
from unlearnjax.recipes.images.run import run_images
from unlearnjax.training.interrupt import Interrupted, Stop

OTHERS = ("wide", "tall")
RECIPE = {
    "kind": "images",
    "name": "small",
    "defaults": {"learning_rate": 0.003, "epochs": 2, "operations": 1},
    "candidates": [{"name": "a", "magnitude": 2}, {"name": "b", "magnitude": 8, "seed": 1}],
    "training": {"batch_size": 6, "optimizer": "adamw"},
    "merges": [{"method": "consensus"}, {"method": "best_single"}],
    "selection": {"lambdas": [0.5, 1], "keep": 0.01},
    "templates": ["a photo of {}.", "stripes {} {{}}"],
    "forget_templates": ['the "{}" kind.'],
    "export": "consensus",
}
PLAIN = {"defaults": {"learning_rate": 0.003}, "merges": [{"method": "uniform"}], "export": "best"}  # compiles faster


def tokenizer(ends=True):
    made = train_tokenizer([f"a photo of {name}." for name in NAMES + OTHERS], 280)
    if ends:
        end = (made.eos_token, made.eos_token_id)
        made.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with clip, the three kinds of stripes, and two more under other names."""
    path = tmp_path_factory.mktemp("clip")
    words = tokenizer()
    image, text = (Tower(width, 2 * width, 1, 2, "quick_gelu", 1e-5) for width in (12, 8))
    config = CLIPConfig(image, text, 6, 8, 4, 3, len(words), 40, words.eos_token_id)
    save_clip(dataclasses.replace(new_clip(config, jax.random.key(0)), tokenizer=words), path / "clip")
    for name, rows, seed in (("data", 60, 0), ("test", 30, 1)):
        write(path / f"{name}.parquet", *stripes(rows, seed))
        pixels, labels = stripes(rows // 2, seed + 2, NAMES[:2])
        write(path / f"forget_{name}.parquet", pixels, labels, names=OTHERS)
    return path


def sources(folder, **changes):
    names = {"data": "data.parquet", "test": "test.parquet", "forget": "forget_data.parquet",
             "forget_test": "forget_test.parquet", **changes}  # fmt: skip
    return ImageSources(**{k: v if v is None or ":" in v else str(folder / v) for k, v in names.items()})


def run(folder, out, recipe=None, gold=None, model="clip", stop=None, resume=False, **changes):
    parsed = image_recipe_from({**RECIPE, **(recipe or {})}, "r.yml")
    given = sources(folder, **changes)
    return run_images(str(folder / model), given, out, parsed, gold=gold, progress=False, stop=stop, resume=resume)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return run(folder, out), out


def accuracy(model, pixels, labels, names, templates):
    """In percent, of CLIP as it is used: features of images and of texts, class by class."""
    images = (pixels / 255 - np.array(model.mean)) / np.array(model.std)
    seen = normed(np.asarray(model.image_features(images)))
    logits = []
    for name in names:
        tokens = [model.tokenizer([t.replace("{}", name)], return_tensors="np")["input_ids"] for t in templates]
        read = np.mean([normed(np.asarray(model.text_features(t)))[0] for t in tokens], axis=0)
        logits.append(seen @ (read / np.linalg.norm(read)))
    return 100 * np.mean(np.argmax(logits, axis=0) == labels)


def test_what_is_written_scores_as_the_report_says(done):
    report, out = done
    model = load_clip(out / "model")
    scores = next(m["scores"] for m in report["models"] if m["name"] == "consensus")
    pixels, labels = stripes(30, 1)
    assert scores["retain"] == pytest.approx(accuracy(model, pixels, labels, NAMES, RECIPE["templates"]))
    pixels, labels = stripes(15, 3, NAMES[:2])
    assert scores["forget"] == pytest.approx(accuracy(model, pixels, labels, OTHERS, RECIPE["forget_templates"]))
    assert scores["test"] is None and scores["mia"] is None


def test_only_the_image_side_changes(done, folder):
    _, out = done
    start, written = load_clip(folder / "clip"), load_clip(out / "model")
    assert set(start.params) == {*IMAGE_SIDE, "text", "text_projection", "logit_scale"}
    for name in set(start.params) - set(IMAGE_SIDE):
        jax.tree.map(np.testing.assert_array_equal, written.params[name], start.params[name])
    for name in IMAGE_SIDE:
        leaves = zip(jax.tree.leaves(written.params[name]), jax.tree.leaves(start.params[name]), strict=True)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)
    texts = ["a photo of tall.", "x"]
    assert written.tokenizer(texts)["input_ids"] == start.tokenizer(texts)["input_ids"]


def test_rows_and_weights_in_the_report(done, folder):
    report, _ = done
    assert {name: x["rows"] for name, x in report["data"].items()} == {
        "train": 27, "retain": 54, "validation forget": 3, "validation retain": 6, "test forget": 15, "test retain": 30,
    }  # fmt: skip
    start = load_clip(folder / "clip").params
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert report["weights"] == {"trained": count([start[name] for name in IMAGE_SIDE]), "all": count(start)}
    consensus = next(m for m in report["merges"] if m["name"] == "consensus")
    assert consensus["sparsity"]["all"] > consensus["sparsity"]["trained"]


def test_a_class_of_the_data_is_forgotten(folder, tmp_path):
    report = run(
        folder, tmp_path / "out", {**PLAIN, "forget_templates": None}, forget="class:upright", forget_test=None
    )
    rows = {name: x["rows"] for name, x in report["data"].items()}
    assert (rows["train"], rows["retain"], rows["test forget"], rows["test retain"]) == (18, 36, 10, 20)


@pytest.mark.slow
def test_linearised_features(folder, tmp_path):
    """Features are linear in the weights and normed after that; at the start they are the model's own."""
    subject = clip_subject(load_clip(folder / "clip"), NAMES)
    linear = subject.linearised()
    pixels = stripes(4, 5)[0].astype(np.float32)
    step = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape), subject.trained)
    eye = {**linear.fixed, "head": np.eye(subject.fixed["head"].shape[1], dtype=np.float32)}

    def features(factor):
        weights = jax.tree.map(lambda p, s: p + np.float32(factor) * s, subject.trained, step)
        return np.asarray(linear.net.logits(weights, eye, pixels)[0])

    plain = subject.net.logits(subject.trained, subject.fixed, pixels)[0]
    same = linear.net.logits(subject.trained, linear.fixed, pixels)[0]
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    zero, one, two = (features(f) for f in (0, 1, 2))  # of length 1, on a great circle
    for x in (zero, one, two):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    for a, b, c in zip(zero, one, two, strict=True):
        assert np.linalg.svd(np.stack([a, b, c]), compute_uv=False)[2] < 1e-5
    report = run(folder, tmp_path / "out", {**PLAIN, "training": {**RECIPE["training"], "linear": True}})
    assert {m["name"] for m in report["models"]} == {"base", "uniform"}


def test_candidates_under_another_head_are_trained_anew_on_resume(folder, tmp_path):
    out = tmp_path / "out"

    class After(Stop):
        """Asks to stop once all candidates are on disk."""

        @property
        def signum(self):
            return 15 if (out / "candidates" / "b").exists() else 0

        @signum.setter
        def signum(self, value):
            pass

    with pytest.raises(Interrupted):
        run(folder, out, stop=After())
    other = {"forget_templates": ["x {}"]}
    assert run(folder, out, other, resume=True)["merges"] == run(folder, tmp_path / "whole", other)["merges"]


BAD = [
    ({"forget_test": None}, {}, None, "give its test images as --forget-test"),
    ({"forget": "fraction:0.5"}, {}, None, "forgets a class of --data, or a data set"),
    ({"forget": "class:wide"}, {}, None, "there is no class 'wide'"),
    ({"forget_test": "test.parquet"}, {}, None, "test.parquet: its classes differ from those of .*forget_data"),
    ({"test": "forget_test.parquet", "forget": "class:upright"}, {}, None, "forget_test.parquet: its classes differ"),
    ({}, {}, "gold", "leave out --gold"),
    ({}, {"selection": {"rule": "closest"}}, None, "take the rule keep"),
    ({}, {"selection": {"statistics": "re-estimated"}}, None, "no BatchNorm"),
    ({}, {"forget_templates": ["{} " + 40 * "x "]}, None, "at most 40"),
]


@pytest.mark.parametrize(("changes", "recipe", "gold", "words"), BAD, ids=str)
def test_what_is_wrong_is_named(folder, tmp_path, changes, recipe, gold, words):
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path / "out", recipe, gold, **changes)
    assert not (tmp_path / "out" / "candidates").exists()


def test_baselines_are_refused(folder, tmp_path):
    recipe = dataclasses.replace(image_recipe_from(RECIPE, "r.yml"), baselines={"salun": {}})
    with pytest.raises(UserError, match="baselines are for classifiers"):
        run_images(str(folder / "clip"), sources(folder), tmp_path / "out", recipe, progress=False)


def test_a_model_without_a_tokenizer_or_without_its_end(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "mute")
    for file in (tmp_path / "mute").glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="mute: has no tokenizer"):
        run(folder, tmp_path / "out", model=tmp_path / "mute")
    endless = dataclasses.replace(load_clip(folder / "clip"), tokenizer=tokenizer(ends=False))
    with pytest.raises(UserError, match=r"puts no end token \(id 1\)"):
        clip_subject(endless, NAMES)


def test_a_template_without_a_place(folder):
    with pytest.raises(UserError, match=r"'a photo' has no \{\}"):
        clip_subject(load_clip(folder / "clip"), NAMES, ["a photo"])
    with pytest.raises(UserError, match="at least one class"):
        clip_subject(load_clip(folder / "clip"), [])
