"""NegMerge's table 2 (2410.05583): unlearning a random tenth of CIFAR-10's training images.

Command (DATA is a folder with train.parquet and test.parquet, as the hub's uoft-cs/cifar10 has them):

    python experiments/negmerge_cifar10.py --data DATA --scale small --out out/negmerge_cifar10

Trains the original model (all training images) and the retrained one (without the forget images; same initialisation
and settings), runs the recipe with every merge and baseline beside them, and again with other BatchNorm handling and
with augmented candidates; for each seed. `--scale paper` is ResNet-18 on all 50000 images with SalUn's settings (182
epochs) and the 27 candidates of the recipe `negmerge`; it needs an accelerator and has not been run. `--scale small` is
a ResNet of three stages (widths 16, 32, 64; one block each) on 5000 images without augmentation, which it learns partly
by heart: an original that knows its training images no better than others has nothing to forget.

Other data sets run at the paper's scale by hub id, such as `--train zh-plus/tiny-imagenet:train --test
zh-plus/tiny-imagenet:valid --size 64`, or CUB-200 at 224 (images are resized, and from 64 on the stem is ImageNet's);
they were not run.

Writes one run per seed and variant under --out, and the figures to keep as negmerge_cifar10_SCALE.json in --results
(runs of other seeds and variants stay in it, so that seeds may be run one by one): each model's accuracy on retain,
forget and test images, MIA-efficacy, and Avg. Gap to the retrained model; the sweeps along lambda (the first seed's as
an SVG beside it). Expected from the
paper (ResNet-18; retain, forget, test, MIA, gap): retrained 100, 94.76, 94.26, 12.88; best single task vector 98.36,
94.85, 91.49, 10.91, 1.62; uniform gap 1.75; NegMerge gap 1.07.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from _images import draw, save, slim, subset

from unlearnjax.data.images import Images, forget_mask, load_images
from unlearnjax.data.labelled import labelled
from unlearnjax.models.vision.classifier import new_classifier, save_classifier
from unlearnjax.models.vision.net import classifier_subject
from unlearnjax.models.vision.resnet import ResNetConfig, resnet18
from unlearnjax.recipes.images.data import ImageSources
from unlearnjax.recipes.images.run import run_images
from unlearnjax.recipes.images.schema import ImageRecipe
from unlearnjax.recipes.load import load_image_recipe
from unlearnjax.report.images import read_images_report, render_images_markdown
from unlearnjax.training.images.fine_tune import fine_tune
from unlearnjax.training.images.settings import ImageCandidate

HERE = Path(__file__).parent
FRACTION = 0.1


class Scale(NamedTuple):
    """Rows of the training and test set (None: all), the model, and how it is trained."""

    rows: int | None
    test_rows: int | None
    config: ResNetConfig
    original: ImageCandidate
    batch: int
    recipe: str


def scale_of(name: str) -> Scale:
    """`small` or `paper`."""
    if name == "paper":  # SalUn's settings
        original = ImageCandidate("original", learning_rate=0.1, epochs=182, schedule="steps", flip=0.5, crop_padding=4)
        return Scale(None, None, resnet18(10), original, 256, str(HERE / "negmerge_cifar10_paper.yml"))
    config = ResNetConfig(10, stem="cifar", embedding=16, widths=(16, 32, 64), depths=(1, 1, 1))
    original = ImageCandidate("original", learning_rate=0.1, epochs=25)
    return Scale(5000, 2000, config, original, 128, str(HERE / "negmerge_cifar10_small.yml"))


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="a folder with train.parquet and test.parquet")
    p.add_argument("--train", help="in its place, for --scale paper: a file or hub id, with --test and --size")
    p.add_argument("--test")
    p.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    p.add_argument("--scale", choices=("small", "paper"), default="small")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--variants", nargs="+", default=["re-estimated", "kept", "frozen", "augmented"],
                   help="the first is run with all baselines for each seed, the others for the first seed")  # fmt: skip
    p.add_argument("--out", required=True)
    p.add_argument("--results", default=str(HERE / "results"))
    a = p.parse_args()
    if (a.data is None) == (a.train is None) or (a.train is None) != (a.test is None):
        p.error("give --data, or --train and --test")
    return a


def trained(scale: Scale, images: Images, folder: Path, seed: int) -> None:
    """Train a classifier from scratch on these images and save it."""
    if folder.exists():
        return
    model = new_classifier("resnet", scale.config, images.names, images.pixels.shape[1], jax.random.key(seed))
    subject = classifier_subject(model)
    settings = dataclasses.replace(scale.original, seed=seed)
    (out,) = fine_tune(subject, labelled(images.pixels, images.labels), [settings], batch_size=scale.batch,
                       batch_norm="batch", progress=True, label=folder.name)  # fmt: skip
    save_classifier(subject.edited(out.trained, out.fixed["statistics"]), folder)


def variant_of(recipe: ImageRecipe, variant: str, first: bool) -> ImageRecipe:
    """The recipe with BatchNorm's statistics moving in fine-tuning and measured anew after the edit ("re-estimated", as
    the recipe has it) or dropped for the start's ("kept"); frozen in fine-tuning, at a tenth of the learning rate, and
    kept; or re-estimated with augmented candidates."""
    training, selection, candidates = recipe.training, recipe.selection, recipe.candidates
    if variant in ("kept", "frozen"):
        selection = dataclasses.replace(selection, statistics="kept")
    if variant == "frozen":
        training = dataclasses.replace(training, batch_norm="frozen")
        candidates = tuple(dataclasses.replace(c, learning_rate=0.1 * c.learning_rate) for c in candidates)
    if variant == "augmented":
        candidates = tuple(dataclasses.replace(c, flip=0.5, crop_padding=4) for c in candidates)
    if first:
        return recipe
    core = tuple(m for m in recipe.merges if m.name in ("consensus", "uniform", "conflict_only"))
    return dataclasses.replace(
        recipe, training=training, selection=selection, candidates=candidates, merges=core, baselines={}
    )


def separation(report: dict[str, Any]) -> dict[str, float]:
    """For each merge: how much lower its forget accuracy is than its retain accuracy at the lambda where the retain
    accuracy has fallen by about five points, minus the same at lambda 0. Near 0: it is damage, not forgetting."""
    found = {}
    for merge in report["merges"]:
        if "sweep" in merge:
            retain, forget = (np.asarray(merge["sweep"][key]) for key in ("retain", "forget"))
            place = int(np.argmin(np.abs(retain - (retain[0] - 5))))
            found[merge["name"]] = float((retain - forget)[place] - (retain - forget)[0])
    return found


def over_seeds(runs: list[dict[str, Any]]) -> str:
    """The runs of one variant as a Markdown table: each model's mean over seeds, with the least and the most; and each
    merge's gap less consensus' own of the same seed."""
    keys = ("retain", "forget", "test", "mia")
    lines = ["| model | retain | forget | test | MIA-efficacy | Avg. Gap | gap less consensus' |", "|---" * 7 + "|"]

    def cell(values: list[float], sign: str = "") -> str:
        return f"{np.mean(values):{sign}.2f} [{min(values):{sign}.2f}, {max(values):{sign}.2f}]"

    models = [{m["name"]: m for m in run["models"]} for run in runs]
    for name in models[0]:
        each = [own[name] for own in models]
        cells = [cell([m["scores"][key] for m in each]) for key in keys]
        if all(m.get("gap") is not None for m in each):
            cells.append(cell([m["gap"] for m in each]))
            cells.append(cell([m["gap"] - own["consensus"]["gap"] for m, own in zip(each, models, strict=True)], "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    parts = [run["separation"] for run in runs]
    lines += ["", "forget accuracy's fall beyond retain accuracy's, where the latter has fallen by five points:"]
    lines += [f"* {name}: {cell([own[name] for own in parts])}" for name in parts[0]]
    return "\n".join(lines)


def main() -> None:
    a = arguments()
    scale, out = scale_of(a.scale), Path(a.out)
    train_file, test_file = a.train, a.test
    if a.data is not None:
        train_file = subset(Path(a.data) / "train.parquet", out / "data" / "train.parquet", scale.rows)
        test_file = subset(Path(a.data) / "test.parquet", out / "data" / "test.parquet", scale.test_rows)
    base_recipe = load_image_recipe(scale.recipe, "")
    images = load_images(train_file, size=a.size, channels=3)
    stem = "cifar" if a.size < 64 else "imagenet"
    scale = scale._replace(config=dataclasses.replace(scale.config, classes=len(images.names), stem=stem))
    results = Path(a.results) / f"negmerge_cifar10_{a.scale}.json"
    known = json.loads(results.read_text("utf-8"))["runs"] if results.exists() else []
    kept: dict[str, Any] = {"scale": a.scale, "runs": known}
    for seed in a.seeds:
        models = out / f"models-seed{seed}"
        mask = forget_mask(images, fraction=FRACTION, seed=seed)
        trained(scale, images, models / "original", seed)
        trained(scale, images.only(~mask), models / "retrained", seed)
        for variant in a.variants if seed == a.seeds[0] else a.variants[:1]:
            selection = dataclasses.replace(base_recipe.selection, seed=seed)
            candidates = tuple(dataclasses.replace(c, seed=c.seed + 1000 * seed) for c in base_recipe.candidates)
            recipe = dataclasses.replace(base_recipe, selection=selection, candidates=candidates)
            recipe = variant_of(recipe, variant, variant == a.variants[0])
            folder = out / f"{variant}-seed{seed}"
            if (folder / "report.json").exists():
                report = read_images_report(folder)
            else:
                sources = ImageSources(train_file, f"fraction:{FRACTION}", test_file, resize=True)
                report = run_images(
                    str(models / "original"), sources, folder, recipe, gold=str(models / "retrained"), resume=True,
                    command=["python", "experiments/negmerge_cifar10.py", "--scale", a.scale],
                    title=f"NegMerge on CIFAR-10 ({a.scale}), {variant}, seed {seed}",
                )  # fmt: skip
            print(f"\n{variant}, seed {seed}\n{render_images_markdown(report)}", flush=True)
            mine = {"seed": seed, "variant": variant, "separation": separation(report), **slim(report)}
            others = [r for r in kept["runs"] if (r["seed"], r["variant"]) != (seed, variant)]
            kept["runs"] = sorted([*others, mine], key=lambda r: (r["seed"], r["variant"] != a.variants[0]))
            save(kept, results)
            if variant == a.variants[0] and seed == kept["runs"][0]["seed"]:
                draw(mine, results.with_suffix(".svg"))
    for variant in a.variants:
        runs = [run for run in kept["runs"] if run["variant"] == variant]
        print(f"\n{variant}, {len(runs)} seeds: mean [least, most]\n{over_seeds(runs)}")


if __name__ == "__main__":
    main()
