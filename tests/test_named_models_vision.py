"""Promise: a model of timm or torchvision by name has its library's loss, gradient and Hessian. (50 s)

Every model is made here with random weights and saved as its library's training script does. The truth is that
library's: its model, its transforms, its loss on the same images, and a dense Hessian of that.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm
import timm.loss
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessdiag
from hessdiag.schemes.assemble import build
from hessdiag.schemes.models import (
    classes,
    segmentation,
    timm_models,
    timm_training,
    torchvision_models,
)
from hessdiag.schemes.recipe import Recipe
from tests import vision_files as make
from tests.bad_files import Hostile
from tests.command import call

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
NORMAL = "?mean=[0.485,0.456,0.406]&std=[0.229,0.224,0.225]"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, and no network."""

    def refuse(*_, **__):
        pytest.fail("something was to be fetched")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket.socket, "connect", refuse)


# the library's own loss


def dense(model, loss_of, params=("*",)):
    """Loss, gradient and Hessian by the parameters of the globs."""
    chosen = [name for name, _ in model.named_parameters() if any(fnmatch(name, glob) for glob in params)]
    values = tuple(dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in chosen)

    def loss(*values):
        def called(*inputs):
            return torch.func.functional_call(model, dict(zip(chosen, values, strict=True)), inputs)

        return loss_of(called)

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*values), values)])
        blocks = torch.autograd.functional.hessian(loss, values)
    H = torch.cat(
        [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(values, blocks, strict=True)]
    )
    return float(loss(*values).detach()), gradient, H.double()


class Written(nn.Module):
    """Hardsigmoid by its formula: torch's own has no second derivative."""

    def forward(self, x):
        return F.relu6(x + 3) / 6


def written_out(model):
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(parent, name, Written())
    return model


def check_equal(problem, truth, params=("*",), *, traced=True):
    problem = replace(problem, params=params)
    loss, gradient, H = truth
    samples = hessdiag.draw(problem.data["train"], samples=100, batch_size=5)
    counts = sum(problem.count(batch) for batch in samples.batches)
    model = problem.model.eval()
    total = sum(problem.total(model, batch) for batch in samples.batches) / counts
    parameters = [dict(model.named_parameters())[name] for name in problem.parameter_names()]
    own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters)])
    assert float(total.detach()) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(own, gradient, rtol=1e-3, atol=1e-5)
    asked = {"samples": 100, "batch_size": 5, "probes": 30, "second_opinion": False}
    found = hessdiag.analyze(problem, quantities=["lambda_max", *(["trace"] if traced else [])], **asked)
    assert found.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    if not traced:
        return
    half = (found.trace.hi - found.trace.lo) / 2
    assert abs(found.trace.value - float(H.trace())) < 2 * half + 1e-3 * float(H.norm())


# timm


def of_timm(args, loss, folder, params):
    """The library's own: its model, its data configuration, its transforms, its loss."""
    model = make.timm_model(args)
    config = timm.data.resolve_data_config(vars(args), model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    images, targets = make.images_of(folder)
    inputs = torch.stack([transform(image) for image in images])
    return dense(model, lambda call: loss(call(inputs), targets), params)


def smoothed(outputs, targets):
    return timm.loss.LabelSmoothingCrossEntropy(0.1)(outputs, targets)


def binary(outputs, targets):
    return timm.loss.BinaryCrossEntropy(smoothing=0.1, target_threshold=0.2, sum_classes=True)(outputs, targets)


BCE = {"bce_loss": True, "bce_target_thresh": 0.2, "bce_sum": True, "mixup": 0.8}
SMALL = {"channels": [2, 2, 2, 2], "layers": [1, 1, 1, 1]}
TIMM = {
    "label smoothing": ({}, smoothed, "cross_entropy/mean(label_smoothing=0.1)"),
    "plain": ({"smoothing": 0.0, "bce_loss": True}, F.cross_entropy, "cross_entropy/mean"),
    "binary": (BCE, binary, "BinaryCrossEntropy"),
    "another size of images": ({"img_size": None, "input_size": [3, 8, 8]}, smoothed, "cross_entropy/mean("),
    "a convolutional network": ({"model": "resnet18", "model_kwargs": SMALL, "img_size": 16}, smoothed, "cross"),
}


@pytest.mark.parametrize("family", TIMM)
def test_timm_is_measured_as_it_was_trained(family, tmp_path):
    check_timm(family, tmp_path)


def check_timm(family, folder):
    given, loss, name = TIMM[family]
    args = make.timm_args(**given)
    data = make.pictures(folder / f"images of {family}")
    args.img_size = args.img_size or 8
    checkpoint = make.timm_checkpoint(folder / family, args)
    problem = hessdiag.load("timm:", f"imagefolder:{data}", checkpoint=checkpoint)
    assert problem.loss_name.startswith(name)
    params = ("layer2.*.bn1.*", "fc.bias") if args.model == "resnet18" else ("*",)
    check_equal(problem, of_timm(args, loss, data, params), params)


def test_averages_of_timm_are_named_and_taken(tmp_path):
    checkpoint = make.timm_checkpoint(tmp_path, make.timm_args())
    data = f"imagefolder:{make.pictures(tmp_path / 'images')}"
    plain = build(Recipe.of("timm:", data=data), str(checkpoint))
    assert any("state_dict_ema" in note and "use_ema" in note for note in plain.notes)
    averaged = hessdiag.load("timm:", data, checkpoint=checkpoint, use_ema=True)
    for one, other in zip(plain.problem.model.parameters(), averaged.model.parameters(), strict=True):
        assert torch.allclose(one * 0.9, other)


def test_print_config_says_what_was_found(tmp_path):
    checkpoint = make.timm_checkpoint(tmp_path, make.timm_args())
    data = make.pictures(tmp_path / "images")
    code, out, err = call(
        *("analyze", "--model", "timm:", "--data", f"imagefolder:{data}", "-c", str(checkpoint)),
        *("-P", "drop_rate=0.5", "--print-config", "--json"),
    )
    rows = {row["what"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert code == 0, err
    assert rows["model"] == ("timm vit_tiny_patch16_224", "args of the checkpoint")
    assert rows["img_size"] == ("8", "args of the checkpoint")
    assert rows["drop_rate"] == ("0.5", "as asked")
    assert "bilinear" in rows["transforms"][0]
    assert rows["weights"][0].endswith("last.pth.tar::state_dict")


def test_the_address_of_the_images_comes_first(tmp_path):
    args = make.timm_args(model="resnet18", model_kwargs=SMALL, img_size=16)
    checkpoint = make.timm_checkpoint(tmp_path, args)
    data = make.pictures(tmp_path / "images")
    problem = hessdiag.load("timm:", f"imagefolder:{data}?size=10&mean=0.5&std=[1,2,4]", checkpoint=checkpoint)
    given = make.timm_args(img_size=10, mean=[0.5], std=[1.0, 2.0, 4.0])
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(vars(given), model=problem.model), is_training=False
    )
    image = make.images_of(data)[0][3]
    assert torch.equal(problem.data["train"][3][0], transform(image))


def test_grey_images_have_one_channel(tmp_path):
    args = make.timm_args(in_chans=1, mean=[0.5], model_kwargs={**make.TINY, "in_chans": 1})
    checkpoint = make.timm_checkpoint(tmp_path, args)
    problem = hessdiag.load("timm:", f"imagefolder:{make.pictures(tmp_path / 'images')}", checkpoint=checkpoint)
    assert problem.data["train"][0][0].shape == (1, 8, 8)


def test_without_a_checkpoint_the_model_is_new(tmp_path, monkeypatch):
    data = f"imagefolder:{make.pictures(tmp_path / 'images')}"
    options = {**make.TINY, "img_size": 8, "num_classes": 3}
    found = build(Recipe.of("timm:vit_tiny_patch16_224", data=data, options=options))
    assert "no checkpoint given: the model as it is initialised" in found.notes
    seen = []
    created = timm.create_model

    def create_model(name, pretrained, **given):
        seen.append(pretrained)
        return created(name, pretrained=False, **given)

    monkeypatch.setattr(timm, "create_model", create_model)
    allowed = build(
        Recipe.of(
            "timm:vit_tiny_patch16_224", data=data, options={**options, "pretrained": True}, allow_download=True
        )
    )
    assert seen == [True]
    assert any("timm's own weights of vit_tiny_patch16_224.augreg" in note for note in allowed.notes)


# torchvision


def plain_transform(images, size=None):
    crop = torchvision.transforms.functional.pil_to_tensor
    pixels = torch.stack([crop(image).float() / 255 for image in images])
    return torchvision.transforms.functional.normalize(pixels, **IMAGENET)


PART = ("features.0.bias", "classifier.1.bias")


def classifier(folder, **options):
    """A classifier of three classes, its images and its dense Hessian by some parameters of several layers."""
    model = make.torchvision_model("squeezenet1_1", num_classes=3, **options)
    data = make.pictures(folder / "images", size=32)
    images, targets = make.images_of(data)
    return model, data, images, targets


def check_torchvision(folder):
    model, data, images, targets = classifier(folder)
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "model.pth")
    problem = hessdiag.load(
        "torchvision:squeezenet1_1", f"imagefolder:{data}{NORMAL}", checkpoint=folder / "model.pth"
    )
    inputs = plain_transform(images)
    truth = dense(model, lambda call: F.cross_entropy(call(inputs), targets), PART)
    check_equal(problem, truth, PART)


def test_torchvision_is_measured_with_the_classes_of_the_file(tmp_path):
    check_torchvision(tmp_path)


def check_reference(folder):
    """What torchvision's classification reference evaluates: its own preset, and the smoothing of its training."""
    model, data, images, targets = classifier(folder)
    content = {"model": model.state_dict(), "args": make.torchvision_args(cutmix_alpha=1.0), "epoch": 1}
    torch.save(content, folder / "model.pth")
    found = build(Recipe.of("torchvision:", data=f"imagefolder:{data}"), str(folder / "model.pth"))
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=36)
    inputs = torch.stack([preset(image) for image in images])
    truth = dense(model, lambda call: F.cross_entropy(call(inputs), targets, label_smoothing=0.2), PART)
    check_equal(found.problem, truth, PART)
    assert any(note.startswith("cutmix_alpha=1.0 left out") for note in found.notes)


def test_torchvisions_reference_is_read_from_its_arguments(tmp_path):
    check_reference(tmp_path)


def test_weights_of_torchvision_lie_in_its_cache(tmp_path):
    model = make.torchvision_model("squeezenet1_1")
    known = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    cache = tmp_path / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / known.url.rpartition("/")[2])
    data = make.pictures(tmp_path / "images", size=40)
    found = build(Recipe.of("torchvision:squeezenet1_1@IMAGENET1K_V1", data=f"imagefolder:{data}"))
    assert torch.equal(found.problem.model.classifier[1].weight, model.classifier[1].weight)
    image = make.images_of(data)[0][5]
    assert torch.equal(found.problem.data["train"][5][0], known.transforms()(image))
    assert "3 of the model's 1000 classes" in " ".join(found.notes)
    assert found.weights.sha256
    assert "IMAGENET1K_V1" in {row.source for row in found.resolved if row.what == "transforms"}


def test_without_a_normalisation_a_note_says_so(tmp_path):
    _, data, images, _ = classifier(tmp_path)
    found = build(Recipe.of("torchvision:squeezenet1_1", data=f"imagefolder:{data}", options={"num_classes": 3}))
    assert any("no normalisation is known" in note and "?mean=" in note for note in found.notes)
    pixels = torchvision.transforms.functional.pil_to_tensor(images[0]) / 255
    assert torch.allclose(found.problem.data["train"][0][0], pixels)


def test_heads_that_only_training_asks_are_left_out(tmp_path):
    model = make.torchvision_model("googlenet", num_classes=3, aux_logits=True)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    data = f"imagefolder:{make.pictures(tmp_path / 'images', size=32)}"
    found = build(Recipe.of("torchvision:googlenet", data=data), str(tmp_path / "model.pth"))
    names = found.problem.parameter_names()
    assert len(names) > 100
    assert not [name for name in names if name.startswith("aux")]
    assert any("auxiliary heads" in note for note in found.notes)
    without = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("aux")}
    torch.save(without, tmp_path / "less.pth")
    assert build(Recipe.of("torchvision:googlenet", data=data), str(tmp_path / "less.pth")).problem.params == (
        "*",
    )


SEGMENTATION = {
    "with an auxiliary head": (
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
        ("backbone.0.1.bias", "aux_classifier.4.bias", "classifier.4.bias"),
    ),
    "without": (("lraspp_mobilenet_v3_large", {}), ("backbone.0.1.bias", "classifier.*.bias")),
}


@pytest.mark.parametrize("family", SEGMENTATION)
def test_segmentation_has_the_loss_of_the_reference(family, tmp_path):
    check_segmentation(family, tmp_path)


def check_segmentation(family, folder):
    (name, options), part = SEGMENTATION[family]
    model = make.torchvision_model(name, num_classes=4, weights_backbone=None, **options)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    root = make.voc(folder / "voc")
    problem = hessdiag.load(
        f"torchvision:{name}",
        f"torchvision:VOCSegmentation?root={root}&{NORMAL[1:]}",
        checkpoint=folder / "model.pth",
    )
    assert list(problem.data) == ["train", "val"]
    rows = [*torchvision.datasets.VOCSegmentation(str(root), image_set="train")]
    inputs = plain_transform([image for image, _ in rows])
    targets = torch.stack([torch.from_numpy(np.array(mask)).long() for _, mask in rows])

    def loss(call):
        outputs = call(inputs)  # references/segmentation/train.py: 0.5 of the auxiliary loss, 255 left out
        losses = {key: F.cross_entropy(x, targets, ignore_index=255) for key, x in outputs.items()}
        return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]

    assert problem.has_outputs == (family == "without")
    check_equal(problem, dense(written_out(model), loss, part), part, traced=False)


PAGE = Path(hessdiag.__file__).parent / "docs" / "schemes_vision.md"
LINES = re.findall(r"^    \$ hessdiag (.*)$", PAGE.read_text(), re.MULTILINE)


def test_the_lines_of_the_page_run(tmp_path):
    make.pictures(tmp_path / "images", size=32)
    make.timm_checkpoint(tmp_path / "run", make.timm_args())
    resnet = timm.create_model("resnet18", num_classes=3)
    torch.save(resnet.state_dict(), "weights.pth")
    squeeze = make.torchvision_model("squeezenet1_1", num_classes=3).state_dict()
    torch.save(squeeze, "model.pth")
    torch.save({"model": squeeze, "args": make.torchvision_args()}, "checkpoint.pth")
    lines = [line for line in LINES if "lightning:" not in line]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)
        quick = ["--measures", "trace", "--no-guard"] if words[0] == "gap" else ["--print-config"]
        code, _, err = call(*words, *quick, "--samples", "4", "-q")
        assert code == 0, err


# data sets of torchvision


def test_data_sets_of_torchvision_have_their_splits(tmp_path):
    root = make.mnist(tmp_path)
    options = {"num_classes": 10}
    problem = hessdiag.load("torchvision:squeezenet1_1", f"torchvision:MNIST?root={root}", options=options)
    assert {split: len(rows) for split, rows in problem.data.items()} == {"train": 6, "test": 4}
    image, target = problem.data["test"][1]
    assert (image.shape, target) == ((3, 28, 28), 1)
    one = hessdiag.load("torchvision:squeezenet1_1", f"torchvision:MNIST?root={root}&train=false", options=options)
    assert list(map(len, one.data.values())) == [4]
    both = ["train=torchvision:MNIST?root={0}&split=test", "test=torchvision:MNIST?root={0}&split=train"]
    swapped = hessdiag.load("torchvision:squeezenet1_1", [text.format(root) for text in both], options=options)
    assert [len(swapped.data[split]) for split in ("train", "test")] == [4, 6]
    made = hessdiag.load(
        "torchvision:squeezenet1_1", "torchvision:FakeData?image_size=[3,32,32]&num_classes=10", options=options
    )
    assert len(made.data["train"]) == 1000


def test_data_are_fetched_once_it_is_allowed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: seen.append(self.root))
    make.mnist(tmp_path)
    for allowed in (False, True):
        hessdiag.load(
            "torchvision:squeezenet1_1",
            f"train=torchvision:MNIST?root={tmp_path}&split=train",
            options={"num_classes": 10},
            allow_download=allowed,
        )
    assert seen == [str(tmp_path)] * len(seen)
    assert seen


# bad input


def of_args(**given):
    def made(folder):
        return make.timm_checkpoint(folder / "timm", make.timm_args(**given))

    return made


def changed(**entries):
    """A checkpoint of timm with other entries."""

    def made(folder):
        file = of_args()(folder)
        torch.save({**torch.load(file, weights_only=False), **entries}, folder / "changed.pth")
        return folder / "changed.pth"

    return made


def cut(folder):
    whole = of_args()(folder).read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    return folder / "cut.pth"


def of_torchvision(name="squeezenet1_1", **options):
    def made(folder):
        torch.save(make.torchvision_model(name, **options).state_dict(), folder / "tv.pth")
        return folder / "tv.pth"

    return made


def none(folder):
    return None


SQUEEZE = "torchvision:squeezenet1_1"
VIT = "timm:vit_tiny_patch16_224"
BAD = {
    "timm: no name": ("timm:", none, (), "no checkpoint is given; name the model"),
    "timm: no args": ("timm:", changed(args=None), (), "holds no args with a model"),
    "timm: a name that is none": ("timm:resnt18", none, (), "did you mean resnet18"),
    "timm: a name of the hub in args": (
        "timm:",
        changed(args={"model": "hf-hub:evil/x"}),
        (),
        "timm has no model",
    ),
    "timm: an unknown option": (VIT, none, ("-P", "width=3"), "width"),
    "timm: an unknown argument in args": ("timm:", changed(args=make.timm_args(model_kwargs={"a": 1})), (), "a=1"),
    "timm: another model": ("timm:resnet18", of_args(), (), "by its args, not of a resnet18: give --model timm:"),
    "timm: another number of classes": ("timm:", of_args(), ("-P", "num_classes=7"), "another number of classes"),
    "timm: fewer classes than the data": ("timm:", of_args(num_classes=2), (), "has 3 classes"),
    "timm: no averages": ("timm:", changed(state_dict_ema=None), ("--use-ema",), "no averaged weights"),
    "timm: objects among args": ("timm:", changed(args=make.timm_args(gp=Hostile())), (), "can run code"),
    "timm: a file cut short": ("timm:", cut, (), "damaged or cut short"),
    "timm: weights of its own": (VIT, none, ("-P", "pretrained=true"), "give --allow-download as well"),
    "timm: two weights": ("timm:", of_args(), ("-P", "pretrained=true"), "one of the two"),
    "timm: a file by another way": (VIT, none, ("-P", "checkpoint_path=x.pth"), "given with -c FILE"),
    "timm: means that do not fit": (
        "timm:",
        of_args(),
        ("--data", "imagefolder:images?mean=[1,2]"),
        "one mean and std for each",
    ),
    "torchvision: no name": ("torchvision:", none, (), "name the model"),
    "torchvision: a name that is none": ("torchvision:resnet81", none, (), "did you mean resnet18"),
    "torchvision: detection": ("torchvision:fasterrcnn_resnet50_fpn", none, (), "a model of detection"),
    "torchvision: video": ("torchvision:r3d_18", none, (), "write a factory"),
    "torchvision: optical flow": ("torchvision:raft_small", none, (), "a model of optical flow"),
    "torchvision: weights that are none": (f"{SQUEEZE}@V9", none, (), "allowed: IMAGENET1K_V1, DEFAULT"),
    "torchvision: weights not fetched": (f"{SQUEEZE}@DEFAULT", none, (), "fetched with --allow-download only"),
    "torchvision: an unknown option": (SQUEEZE, none, ("-P", "width=3"), "width"),
    "torchvision: weights as an option": (SQUEEZE, none, ("-P", "weights=DEFAULT"), f"{SQUEEZE}@WEIGHTS"),
    "torchvision: another model": (SQUEEZE, of_torchvision("shufflenet_v2_x0_5"), (), "does not fit the model"),
    "torchvision: fewer classes than the data": (SQUEEZE, of_torchvision(num_classes=2), (), "has 3 classes"),
    "torchvision: fewer classes than labels": (
        SQUEEZE,
        of_torchvision(num_classes=2),
        ("--data", "npz:x.npz"),
        "label",
    ),
    "torchvision: no masks": (
        "torchvision:lraspp_mobilenet_v3_large",
        none,
        (),
        "needs masks of classes as images",
    ),
    "data: a set that is none": (SQUEEZE, none, ("--data", "torchvision:CIFAR11"), "did you mean CIFAR10"),
    "data: files that are not there": (
        SQUEEZE,
        none,
        ("--data", "torchvision:CIFAR10"),
        "--allow-download fetches",
    ),
    "data: an unknown option": (SQUEEZE, none, ("--data", "torchvision:CIFAR10?year=3"), "allowed: root, train"),
    "data: text": (SQUEEZE, none, ("--data", "text:words.txt"), "no tokenizer"),
}


def refusal(model, made, more, folder):
    shutil.rmtree(folder / "images", ignore_errors=True)
    make.pictures(folder / "images", size=32)
    (folder / "words.txt").write_text("to be or not to be")
    np.savez(folder / "x.npz", x=np.zeros((4, 32, 32, 3), "uint8"), y=np.arange(4))
    checkpoint = made(folder)
    data = () if "--data" in more else ("--data", "imagefolder:images")
    given = ("-c", str(checkpoint)) if checkpoint else ()
    code, out, err = call(
        "analyze", "--model", model, *data, *given, *more, "--quantities", "trace", "--samples", "4", "-q"
    )
    assert code in (2, 4), (code, out, err)
    return err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path):
    check_bad(name, tmp_path)


def check_bad(name, folder):
    model, made, more, words = BAD[name]
    err = refusal(model, made, more, folder)
    assert words in err
    assert err.count("\n") == 1, err
    assert not (folder / "marker").exists()


# what these tests must notice


def make_training():
    from hessdiag.schemes.models.torchvision_training import Training

    return Training()


def check_uneven(folder):
    fields = segmentation.loss_of_segmentation(Heads())
    mask = torch.full((1, 4, 4), 255)
    mask[0, 0, :3] = 1
    assert fields["weight"]((torch.zeros(1, 3, 4, 4), mask)) == 3


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.aux_classifier = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return {"out": self.out(x), "aux": self.aux_classifier(x)}


def check_formula(folder):
    torch.manual_seed(0)
    model, inputs = Heads(), torch.randn(2, 3, 5, 5)
    masks = torch.randint(4, (2, 5, 5)).masked_fill(torch.rand(2, 5, 5) < 0.3, 255)
    kept = masks != 255
    with torch.no_grad():
        scores = [x.movedim(1, -1)[kept] for x in model(inputs).values()]
        main, aside = (float(F.cross_entropy(x, masks[kept])) for x in scores)
        found = float(segmentation.loss_of_segmentation(model)["loss"](model, (inputs, masks)))
    assert found == pytest.approx(main + 0.5 * aside, rel=1e-5)


def test_the_auxiliary_head_counts_half_and_borders_do_not():
    check_formula(None)


def test_pixels_that_count_weigh():
    check_uneven(None)


def test_last_layers_are_told_from_others():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 7)).state_dict()
    assert classes.classes_of(state, model) == 7
    assert classes.classes_of({f"model.{name}": t for name, t in state.items()}, model) == 7
    assert classes.classes_of({n: t for n, t in state.items() if "num_batches" not in n}, model) == 7
    assert classes.classes_of(model.state_dict(), model) is None
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 7)).state_dict()
    assert classes.classes_of(wider, model) is None
    assert classes.classes_of({}, model) is None


BREAKAGES = {
    "smoothing is forgotten": (
        lambda patch: patch.setattr(timm_training, "_number", lambda value: 0.0),
        lambda folder: check_timm("label smoothing", folder),
    ),
    "the loss is taken for a binary one without smoothing": (
        lambda patch: patch.setattr(timm_training, "_number", lambda value: 0.1),
        lambda folder: check_timm("plain", folder),
    ),
    "the script's transforms are forgotten": (
        lambda patch: patch.setattr(timm_models, "OF_DATA", ("img_size",)),
        lambda folder: check_timm("label smoothing", folder),
    ),
    "the size of the images is forgotten": (
        lambda patch: patch.setattr(timm_models, "_size", lambda args: None),
        lambda folder: check_timm("label smoothing", folder),
    ),
    "images are not converted": (
        lambda patch: patch.setattr(timm_models, "MODES", {}),
        test_grey_images_have_one_channel,
    ),
    "classes of the file are not looked at": (
        lambda patch: patch.setattr(torchvision_models, "classes_of", lambda state, model: None),
        check_torchvision,
    ),
    "classes of the data are not counted": (
        lambda patch: patch.setattr(timm_models, "check_classes", lambda rows, count, model: None),
        lambda folder: check_bad("timm: fewer classes than the data", folder),
    ),
    "the reference's preset is forgotten": (
        lambda patch: patch.setattr(torchvision_models, "training_of", lambda args, segmenting: make_training()),
        check_reference,
    ),
    "the auxiliary head counts in full": (
        lambda patch: patch.setattr(segmentation, "HALF", 1.0),
        check_formula,
    ),
    "borders count": (
        lambda patch: patch.setattr(segmentation, "IGNORED", 0),
        check_formula,
    ),
    "pixels are counted by images": (
        lambda patch: patch.setattr(segmentation, "pixels_that_count", lambda batch: float(len(batch[0]))),
        lambda folder: check_uneven(folder),
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch, tmp_path):
    damage, check = BREAKAGES[name]
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    check(tmp_path / "before")
    damage(monkeypatch)
    monkeypatch.chdir(tmp_path / "after")
    with pytest.raises((AssertionError, hessdiag.HessdiagError, RuntimeError, IndexError)):
        check(tmp_path / "after")
