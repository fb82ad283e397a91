"""Images, masks, and checkpoints of timm and torchvision, tiny, in the formats of their own training scripts."""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = ("cat", "dog", "owl")
TINY = {"embed_dim": 4, "depth": 1, "num_heads": 1, "patch_size": 4}


def pictures(folder: Path, count: int = 4, size: int = 12) -> Path:
    """A folder per class."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (size, size + 2, 3), "uint8")).save(
                folder / name / f"{index}.png"
            )
    return folder


def images_of(folder: Path) -> tuple[list[Any], torch.Tensor]:
    """The same, opened by Pillow, in the order of ImageFolder."""
    files = sorted(folder.rglob("*.png"))
    targets = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    return [Image.open(file).convert("RGB") for file in files], targets


def mnist(folder: Path) -> Path:
    """The idx files of torchvision's MNIST."""
    raw, rng = folder / "MNIST" / "raw", np.random.default_rng(1)
    raw.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        pixels = rng.integers(0, 255, count * 784, "uint8").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    return folder


def voc(folder: Path, size: int = 32) -> Path:
    """Pascal VOC 2012 as torchvision's VOCSegmentation finds it: two training images, one for validation."""
    base, rng = folder / "VOCdevkit" / "VOC2012", np.random.default_rng(2)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for split, names in {"train": "ab", "val": "c"}.items():
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.fromarray(rng.integers(0, 255, (size, size, 3), "uint8")).save(
                base / "JPEGImages" / f"{name}.jpg"
            )
            mask = rng.choice([0, 1, 2, 255], (size, size)).astype("uint8")
            Image.fromarray(mask).save(base / "SegmentationClass" / f"{name}.png")
    return folder


def timm_args(**given: Any) -> argparse.Namespace:
    """What timm's train.py saves of its arguments."""
    own = {"model": "vit_tiny_patch16_224", "num_classes": 3, "in_chans": None, "img_size": 8, "input_size": None}
    own |= {"model_kwargs": dict(TINY), "gp": None, "bn_eps": None, "lr": 0.1, "opt": "sgd", "pretrained": True}
    own |= {"mean": [0.4, 0.5, 0.6], "std": [0.2], "interpolation": "bilinear", "crop_pct": 0.75}
    own |= {"smoothing": 0.1, "bce_loss": False, "jsd_loss": False, "mixup": 0.0, "cutmix": 0.0}
    return argparse.Namespace(**{**own, **given})


def timm_model(args: Any) -> nn.Module:
    """As train.py builds it, with weights that a training could leave."""
    import timm

    size = {"img_size": args.img_size} if "vit" in args.model else {}
    model = timm.create_model(args.model, num_classes=args.num_classes, **size, **args.model_kwargs)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.eval()


def timm_checkpoint(folder: Path, args: Any) -> Path:
    """What timm's own CheckpointSaver writes; its averages are 0.9 times the weights."""
    from timm.utils import CheckpointSaver, ModelEmaV2

    model = timm_model(args)
    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    averaged = ModelEmaV2(model)
    for parameter in averaged.module.parameters():
        parameter.data.mul_(0.9)
    folder.mkdir(exist_ok=True, parents=True)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=averaged, checkpoint_dir=str(folder))
    saver.save_checkpoint(2, 0.5)
    return folder / "last.pth.tar"


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A model of torchvision, in evaluation mode, with running statistics that are none of the start."""
    import torchvision

    torch.manual_seed(4)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision.models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)  # off the kinks of ReLU
    return model.eval()


def torchvision_args(**given: Any) -> argparse.Namespace:
    """What torchvision's references/classification/train.py saves of its arguments."""
    own = {"model": "squeezenet1_1", "label_smoothing": 0.2, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "lr": 0.1}
    own |= {"val_resize_size": 36, "val_crop_size": 32, "interpolation": "bilinear", "weights": None}
    return argparse.Namespace(**{**own, **given})
