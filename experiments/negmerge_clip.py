"""NegMerge's CLIP scenario (2410.05583): one data set is forgotten, another is kept, under frozen zero-shot heads.

Command (CIFAR10 and MNIST are folders with train.parquet and test.parquet, as the hub's uoft-cs/cifar10 and
ylecun/mnist have them):

    python experiments/negmerge_clip.py --cifar10 CIFAR10 --mnist MNIST --linear --out out/negmerge_clip

`--scale small` trains a CLIP of 0.48M weights from scratch (images 32x32 RGB in patches of 4; see `_clip.train_clip`
for the loss) on the first 6000 training images of both data sets with captions of their classes. Then the recipe
forgets MNIST and keeps CIFAR-10, and the other way round: 9 candidates are fine-tuned on 1800 of the first 2000
training images of what is forgotten (the other 200 choose lambda, together with 500 held-out ones of what is kept);
accuracy is of the first 1000 test images of either. What is kept was never seen in fine-tuning. `--linear` adds the
first direction with candidates trained and scored in the tangent space (2305.12827). Held-out images are new to the
candidates, but not to the CLIP itself, so that its accuracy on them is higher than on test images; the rule only
compares it with itself. MNIST's first 5000 test images are the easier half.

`--scale paper` runs the shipped recipe `negmerge-clip` (30 candidates) on OpenAI's CLIP for one forget set; it needs an
accelerator and was not run here:

    python experiments/negmerge_clip.py --scale paper --model openai/clip-vit-base-patch32 --forget-set cars \\
        --forget-data tanganke/stanford_cars:train --forget-test tanganke/stanford_cars:test \\
        --retain-data IMAGENET_TRAIN.parquet --retain-test ILSVRC/imagenet-1k:validation --out out/negmerge_clip_cars

The paper's figure is the mean over eight runs, with these forget sets (name, hub id that should hold it, epochs of its
pool; the recipe takes 40):

    cars tanganke/stanford_cars 70      dtd tanganke/dtd 100               eurosat tanganke/eurosat 40
    gtsrb tanganke/gtsrb 40             mnist ylecun/mnist 30              resisc45 tanganke/resisc45 40
    sun397 tanganke/sun397 40           svhn ufldl-stanford/svhn:cropped_digits 30

TEMPLATES has the texts of their heads. Known to differ from the paper: ImageNet's head is of the one template "a photo
of a {}." and the data set's own class names (there: 80 templates, shortened names; likewise EuroSAT's names), and
images are flipped but not cropped at random scales. Lambda is chosen on a tenth of IMAGENET_TRAIN, at most 5000 images,
as there: some 50000 rows do, and all of ImageNet's would not fit in memory.

Writes one run per direction under --out, and the figures to keep as experiments/results/negmerge_clip_SCALE.json: each
merge's accuracy on test images of what is forgotten and of what is kept, its sparsity, its sweep along lambda (each
direction's as an SVG beside it). Expected
from the paper (B/32, mean of eight; forget, retain): pretrained 48.13, 63.33; best single task vector 23.63, 60.60;
uniform 22.50, 60.55; TIES 26.21, 61.08; MagMax 25.24, 60.95; NegMerge 20.76, 60.36.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from _clip import Captioned, train_clip
from _images import draw, save, slim, subset

from unlearnjax.data.images import Images, load_images
from unlearnjax.data.labelled import labelled
from unlearnjax.evaluation.images import Sheet, score
from unlearnjax.models.vision.clip_model import load_clip, save_clip
from unlearnjax.models.vision.net import clip_subject
from unlearnjax.recipes.images.data import ImageSources
from unlearnjax.recipes.images.run import run_images
from unlearnjax.recipes.images.schema import ImageRecipe
from unlearnjax.recipes.load import load_image_recipe
from unlearnjax.report.images import read_images_report, render_images_markdown

HERE = Path(__file__).parent
SIZE, CHANNELS = 32, 3
NUMBER = 'a photo of the number: "{}".'
VIEWS = [f"{kind} {what} of" for kind in ("satellite", "aerial") for what in ("imagery", "photo", "view")]
TEMPLATES = {  # of the paper's heads (8, 8, 3, 3, 1, 18, 2 and 1 texts), which are those of OpenAI's CLIP
    "cars": (
        *(f"a photo of {which} {{}}." for which in ("a", "the", "my", "my dirty", "my clean", "my new", "my old")),
        "i love my {}!",
    ),
    "dtd": tuple(f"a photo of {a} {{}} {what}." for a in ("a", "the")
                 for what in ("texture", "pattern", "thing", "object")),
    "eurosat": tuple(f"a centered satellite photo of {a}{{}}." for a in ("", "a ", "the ")),
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "mnist": (NUMBER,),
    "resisc45": tuple(f"{view} {a}{{}}." for view in VIEWS for a in ("", "a ", "the ")),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "svhn": (NUMBER,),
}  # fmt: skip
SMALL_TEMPLATES = {
    "cifar10": ("a photo of a {}.", "a photo of the {}.", "an image of a {}."),
    "mnist": (NUMBER, "a photo of the digit {}.", "a handwritten {}."),
}


class Files(NamedTuple):
    """Of one data set, as parquet files: what CLIP is trained on, what is fine-tuned on to forget, and test images."""

    train: str
    forget: str
    test: str


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--scale", choices=("small", "paper"), default="small")
    p.add_argument("--linear", action="store_true", help="add (at the paper's scale: take) linearised candidates")
    p.add_argument("--recipe", help="default: experiments/negmerge_clip_small.yml, or negmerge-clip")
    p.add_argument("--seed", type=int, default=0, help="of CLIP and what is held out; moves the candidates' seeds too")
    p.add_argument("--out", required=True)
    p.add_argument("--results", default=str(HERE / "results"))
    small = p.add_argument_group("--scale small")
    small.add_argument("--cifar10", help="a folder with train.parquet and test.parquet")
    small.add_argument("--mnist", help="the same")
    small.add_argument("--rows", type=int, default=6000, help="of either data set, for CLIP")
    small.add_argument("--forget-rows", type=int, default=2000, help="of what is forgotten")
    small.add_argument("--test-rows", type=int, default=1000, help="of either data set")
    small.add_argument("--epochs", type=int, default=30, help="of CLIP's training")
    paper = p.add_argument_group("--scale paper")
    paper.add_argument("--model", help="a folder or hub id of a CLIP model")
    paper.add_argument("--forget-set", choices=sorted(TEMPLATES), help="whose templates to take")
    for name in ("--forget-data", "--forget-test", "--retain-data", "--retain-test"):
        paper.add_argument(name, help="a parquet file or hub id")
    a = p.parse_args()
    needed = {"small": ("cifar10", "mnist"),
              "paper": ("model", "forget_set", "forget_data", "forget_test", "retain_data", "retain_test")}  # fmt: skip
    for name in needed[a.scale]:
        if getattr(a, name) is None:
            p.error(f"--scale {a.scale} needs --{name.replace('_', '-')}")
    return a


def files_of(name: str, a: argparse.Namespace) -> Files:
    """The first rows of `--cifar10` or `--mnist`, written under --out."""
    source, target = Path(getattr(a, name)), Path(a.out) / "data"
    cut = lambda split, rows: subset(source / f"{split}.parquet", target / f"{name}-{split}-{rows}.parquet", rows)  # noqa: E731
    return Files(cut("train", a.rows), cut("train", a.forget_rows), cut("test", a.test_rows))


def load(file: str) -> Images:
    return load_images(file, size=SIZE, channels=CHANNELS)


def trained(files: dict[str, Files], a: argparse.Namespace) -> Path:
    """The folder of the small CLIP, which is trained unless it is there."""
    folder = Path(a.out) / f"clip-{a.rows}x{a.epochs}-seed{a.seed}"
    if not folder.exists():
        sets = [Captioned(load(files[name].train), templates) for name, templates in SMALL_TEMPLATES.items()]
        model = train_clip(sets, epochs=a.epochs, batch=128, learning_rate=1e-3, seed=a.seed)
        save_clip(model, folder)
    return folder


def zero_shot(folder: Path, files: dict[str, Files]) -> dict[str, float]:
    """Accuracy on each test set among its own classes, in percent."""
    model, found = load_clip(folder), {}
    for name, own in files.items():
        images = load(own.test)
        subject = clip_subject(model, images.names, SMALL_TEMPLATES[name])
        sheet = Sheet(labelled(images.pixels, images.labels), subject.fixed)
        found[name] = float(score(subject.net, subject.trained, sheet).accuracy())
    return found


def with_seed(recipe: ImageRecipe, seed: int) -> ImageRecipe:
    """The recipe with other seeds for another `seed`."""
    candidates = tuple(dataclasses.replace(c, seed=c.seed + 1000 * seed) for c in recipe.candidates)
    selection = dataclasses.replace(recipe.selection, seed=recipe.selection.seed + seed)
    return dataclasses.replace(recipe, candidates=candidates, selection=selection)


def run(model: str, sources: ImageSources, folder: Path, recipe: ImageRecipe, linear: bool, title: str, a: Any) -> Any:
    """The recipe's report; one that is there already is read, and an unfinished run goes on."""
    if (folder / "report.json").exists():
        return read_images_report(folder)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, linear=linear))
    return run_images(
        model, sources, folder, recipe, resume=True, title=title,
        command=["python", "experiments/negmerge_clip.py", "--scale", a.scale, *(["--linear"] if a.linear else [])],
    )  # fmt: skip


def small(a: argparse.Namespace) -> None:
    recipe = with_seed(load_image_recipe(a.recipe or str(HERE / "negmerge_clip_small.yml"), ""), a.seed)
    files = {name: files_of(name, a) for name in SMALL_TEMPLATES}
    folder = trained(files, a)
    kept: dict[str, Any] = {"scale": a.scale, "seed": a.seed, "zero_shot": zero_shot(folder, files), "runs": []}
    print("\n| test images | zero-shot accuracy |\n|---|---|")
    print("\n".join(f"| {name} | {value:.2f} |" for name, value in kept["zero_shot"].items()))
    directions = [("mnist", "cifar10", False), ("cifar10", "mnist", False), ("mnist", "cifar10", True)]
    for forget, retain, linear in directions if a.linear else directions[:2]:
        name = f"forget {forget}, keep {retain}" + (", linearised" if linear else "")
        sources = ImageSources(
            files[retain].train, files[forget].forget, files[retain].test, forget_test=files[forget].test
        )
        own = dataclasses.replace(recipe, templates=SMALL_TEMPLATES[retain], forget_templates=SMALL_TEMPLATES[forget])
        out = Path(a.out) / f"{forget}{'-linear' if linear else ''}-seed{a.seed}"
        report = run(str(folder), sources, out, own, linear, f"NegMerge on a small CLIP: {name}", a)
        print(f"\n{name}\n{render_images_markdown(report)}", flush=True)
        kept["runs"].append({"forget": forget, "retain": retain, "linear": linear, **slim(report)})
        save(kept, Path(a.results) / "negmerge_clip_small.json")
        way = f"forget_{forget}{'_linear' if linear else ''}"
        draw(kept["runs"][-1], Path(a.results) / f"negmerge_clip_small_{way}.svg")


def paper(a: argparse.Namespace) -> None:
    recipe = with_seed(load_image_recipe(a.recipe or "negmerge-clip", a.model), a.seed)
    recipe = dataclasses.replace(recipe, forget_templates=TEMPLATES[a.forget_set])
    sources = ImageSources(a.retain_data, a.forget_data, a.retain_test, forget_test=a.forget_test)
    report = run(a.model, sources, Path(a.out), recipe, a.linear, f"NegMerge on CLIP: forget {a.forget_set}", a)
    print(render_images_markdown(report))
    kept = {"scale": a.scale, "seed": a.seed, "forget": a.forget_set, "linear": a.linear, **slim(report)}
    save(kept, Path(a.results) / f"negmerge_clip_paper_{a.forget_set}.json")


def main() -> None:
    a = arguments()
    small(a) if a.scale == "small" else paper(a)


if __name__ == "__main__":
    main()
