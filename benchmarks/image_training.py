"""Fine-tuning N candidates of an image classifier: this library's ways to map candidates and loop over updates, one
candidate after another, and torch (transformers' ResNet, channels last, the same threads).

    python benchmarks/image_training.py --out benchmarks/results/image_training_cpu.json

A ResNet with the CIFAR stem on 32 x 32 images, SGD with momentum, BatchNorm frozen, batch 128. Each way is a process of
its own; they take turns, lap by lap. `default` is what `fine_tune` chooses on this device. `plain` is the same with
XLA's own gradient of the convolutions' kernels. Reported: images per second times candidates, and the ratio to torch
and to one after another, lap by lap; and whether the losses agree with torch's (1e-3).
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common as bench

BATCH = 128


def _data() -> Any:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4 * BATCH, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, 4 * BATCH).astype(
        np.int32
    )


def made(folder: str, widths: list[int], depth: int) -> None:
    """Write the model that all train."""
    import jax

    from unlearnjax.models.vision.classifier import new_classifier, save_classifier
    from unlearnjax.models.vision.resnet import ResNetConfig

    sizes = tuple(widths)
    config = ResNetConfig(10, stem="cifar", embedding=sizes[0], widths=sizes, depths=(depth,) * len(sizes))
    save_classifier(new_classifier("resnet", config, tuple("0123456789"), 32, jax.random.key(0)), folder)


def ours(folder: str, way: str, n: int, updates: int) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """`updates` of each of `n` candidates in one of our ways."""
    import time

    import jax
    import numpy as np

    if way == "plain":
        import unlearnjax.models.vision.layers as layers
        from unlearnjax.models.vision import convolution

        layers.convolve = lambda images, kernel, stride, padding: convolution._plain((stride, padding), images, kernel)
    from unlearnjax.data.labelled import labelled
    from unlearnjax.models.vision.classifier import load_classifier
    from unlearnjax.models.vision.net import classifier_subject
    from unlearnjax.training.images.fine_tune import Mapping, default_mapping, fine_tune
    from unlearnjax.training.images.settings import ImageCandidate

    subject = classifier_subject(load_classifier(folder))
    data = labelled(*_data())
    epochs = -(-updates // 4)
    candidates = [
        ImageCandidate(str(i), learning_rate=0.01, epochs=epochs, seed=i, schedule="constant") for i in range(n)
    ]
    mapping = {
        "default": default_mapping(n), "plain": default_mapping(n),
        "sequential": Mapping(1, "unroll", 1), "scan": Mapping(1, "unroll", 4),
        "vmap": Mapping(n, "vmap", 1), "unroll": Mapping(n, "unroll", 1),
    }[way]  # fmt: skip

    def lap() -> float:
        begin = time.perf_counter()
        found = list(fine_tune(subject, data, candidates, batch_size=BATCH, mapping=mapping))
        seconds = time.perf_counter() - begin
        lap.losses = [f.losses for f in found]  # type: ignore[attr-defined]
        return n * epochs * 4 * BATCH / seconds

    begin = time.perf_counter()
    lap()
    first = time.perf_counter() - begin

    def after() -> dict[str, Any]:
        return {"losses": np.asarray(lap.losses)[0].tolist(), **bench.memory(bench.jax_peak_mib())}  # type: ignore[attr-defined]

    about = {"mapping": mapping._asdict(), "first_call_seconds": first, "device": jax.devices()[0].device_kind}
    return about, bench.answers(lap, after)


def theirs(folder: str, n: int, updates: int) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """torch, one candidate after another."""
    import time

    import torch
    from safetensors.torch import load_file
    from torch import nn
    from transformers import ResNetConfig, ResNetForImageClassification

    from unlearnjax.training.images.fine_tune import batches, shuffled
    from unlearnjax.training.images.settings import ImageCandidate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ResNetConfig.from_pretrained(folder)
    pixels, labels = _data()
    mean, std = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last).to(device)
    answers = torch.from_numpy(labels).long().to(device)
    epochs = -(-updates // 4)
    state = load_file(Path(folder) / "model.safetensors")

    def fresh() -> nn.Module:
        model = ResNetForImageClassification(config)
        model.resnet.embedder.embedder.convolution = nn.Conv2d(3, config.embedding_size, 3, padding=1, bias=False)
        model.resnet.embedder.pooler = nn.Identity()
        model.load_state_dict(state)
        return model.eval().to(device, memory_format=torch.channels_last)

    def lap() -> float:
        kept = []
        begin = time.perf_counter()
        for i in range(n):
            model = fresh()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for rows, _ in batches(ImageCandidate(str(i), epochs=epochs, seed=i), shuffled(len(labels)), BATCH):
                own = torch.from_numpy(rows).long().to(device)
                loss = nn.functional.cross_entropy(model(images[own]).logits, answers[own])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if i == 0:
                    kept.append(loss.item())
        if device == "cuda":
            torch.cuda.synchronize()
        lap.losses = kept  # type: ignore[attr-defined]
        return n * epochs * 4 * BATCH / (time.perf_counter() - begin)

    lap()

    def after() -> dict[str, Any]:
        return {"losses": lap.losses, **bench.memory()}  # type: ignore[attr-defined]

    return {"threads": torch.get_num_threads(), "device": device}, bench.answers(lap, after)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--n", type=int, nargs="+", default=[8, 27])
    p.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    p.add_argument("--depth", type=int, default=1, help="blocks per stage")
    p.add_argument("--ways", nargs="+", default=["default", "sequential", "plain", "scan", "vmap", "unroll"])
    p.add_argument("--updates", type=int, default=4, help="of each candidate, in a lap")
    p.add_argument("--laps", type=int, default=3)
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    result: dict[str, Any] = {"benchmark": "image_training", "batch": BATCH, "widths": a.widths, "depth": a.depth,
                              "hardware": bench.in_child(bench.hardware), "cases": []}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        bench.in_child(made, folder, a.widths, a.depth)
        for n in a.n:
            ways = a.ways if n == a.n[0] else [w for w in a.ways if w in ("default", "sequential")]
            jobs: dict[str, Any] = {way: (ours, (folder, way, n, a.updates)) for way in ways}
            jobs["torch"] = (theirs, (folder, n, a.updates))
            done = bench.measure(jobs, a.laps, together=result["hardware"]["platform"] == "cpu")
            expected = done["torch"].after["losses"]
            for way, one in done.items():
                apart = max(abs(x - y) for x, y in zip(one.after["losses"], expected, strict=True))
                line = {"n": n, "way": way, "candidate_images_per_second": bench.spread(one.laps), **one.info,
                        "over_torch": bench.ratio(one.laps, done["torch"].laps), "largest_loss_difference": apart,
                        **{k: v for k, v in one.after.items() if k != "losses"}}  # fmt: skip
                if not apart < 1e-3:
                    raise SystemExit(f"{way}: losses differ from torch's by {apart}")
                bench.emit(line)
                result["cases"].append(line)
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
