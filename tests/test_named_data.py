"""Promise: texts, tables and folders of images by name are the rows that lie there, or one line says why. (5 s)"""

from __future__ import annotations

import gzip
import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hessdiag
from hessdiag.errors import HessdiagError
from hessdiag.schemes import known
from hessdiag.schemes.assemble import read_data
from hessdiag.schemes.data import folders, tables
from hessdiag.schemes.data import text as texts
from hessdiag.schemes.recipe import Recipe
from tests.command import call

OF_TEXT = "hf:somewhere"  # a model that takes text; it is not looked at


def tiny(place, checkpoint=None):
    """The entry point of another package: of so many inputs, two classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(place), 2))


@pytest.fixture(autouse=True)
def others(monkeypatch):
    mine = [EntryPoint("tiny", f"{__name__}:tiny", "hessdiag.models")]
    monkeypatch.setattr(known, "entry_points", lambda group: mine if group == "hessdiag.models" else [])


def rows(*data, model=OF_TEXT, **fields):
    return read_data(Recipe(model=model, data=data, **fields))


def write(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def picture(file, colour, size=(4, 3), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)


def pictures(folder):
    """Three of each of two classes, and a file that is no image."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(3):
            picture(folder / name / f"{index}.png", (label * 200, index, 0))
    write(folder / "dog" / "notes.txt", "none")
    return folder


# texts


def test_a_text_is_one_document_a_file(tmp_path):
    write(tmp_path / "part2.txt", "zwei")
    write(tmp_path / "part10.txt", "ten")
    (tmp_path / "all.txt.gz").write_bytes(gzip.compress("\ufeffgrüße".encode()))
    found = rows(f"text:{tmp_path}/part*.txt?block=7")["train"]
    assert (found.kind, found.rows, found.options) == ("text", ["zwei\n", "ten\n"], {"block": 7})
    assert rows(f"text:{tmp_path}/all.txt.gz")["train"].rows == ["grüße"]
    assert rows("text:part*.txt", root=str(tmp_path))["train"].rows == ["zwei\n", "ten\n"]
    both = rows(f"train=text:{tmp_path}/part2.txt", f"test=text:{tmp_path}/part10.txt")
    assert {split: one.rows for split, one in both.items()} == {"train": ["zwei\n"], "test": ["ten\n"]}


# tables


def test_records_have_a_text_and_a_label(tmp_path):
    check_records(tmp_path)


def check_records(folder):
    lines = [{"text": "a", "label": 1, "id": 7}, {"text": "b", "label": "good"}]
    file = write(folder / "a.jsonl", *map(json.dumps, lines), "")
    found = rows(f"jsonl:{file}?max_length=9")["train"]
    assert (found.kind, found.options) == ("records", {"max_length": 9})
    assert list(found.rows) == [{"text": "a", "label": 1}, {"text": "b", "label": "good"}]
    table = write(folder / "a.csv", "one,two,mark,n", 'to be,"or, not",3,1', "x,y,4,2")
    found = rows(f"csv:{table}?text=one&text_pair=two&label=mark")["train"]
    assert list(found.rows) == [
        {"text": "to be", "text_pair": "or, not", "label": 3},
        {"text": "x", "text_pair": "y", "label": 4},
    ]
    assert type(found.rows[0]["label"]) is int
    found = rows(f"csv:{table}?text=two&label=n", model="tiny:2")["train"]
    assert found.rows[1] == {"text": "y", "label": 2}
    alone = write(folder / "b.csv", "text", "NA", "null")
    assert list(rows(f"csv:{alone}")["train"].rows) == [{"text": "NA"}, {"text": "null"}]


def test_columns_of_numbers_are_inputs_and_targets(tmp_path):
    check_numbers(tmp_path)


def check_numbers(folder):
    file = write(folder / "a.csv", "u,kind,v", "1.5,1,2", "3,0,-4e1")
    inputs, targets = rows(f"csv:{file}?target=kind", model="tiny:2")["train"].rows.tensors
    assert torch.equal(inputs, torch.tensor([[1.5, 2], [3, -40]]))
    assert torch.equal(targets, torch.tensor([1, 0]))
    other = write(folder / "a.tsv", "u\ty", "1\t0.5", "2\t1")
    inputs, targets = rows(f"csv:{other}?target=y&sep=\t", model="tiny:1")["train"].rows.tensors
    assert targets.dtype == torch.float32
    lines = write(folder / "a.jsonl", '{"a": 1, "y": 2}', '{"a": 3, "y": 4}')
    inputs, targets = rows(f"jsonl:{lines}?target=y", model="tiny:1")["train"].rows.tensors
    assert (inputs.tolist(), targets.tolist()) == ([[1.0], [3.0]], [2, 4])


def test_a_table_gives_the_hessian_of_its_rows(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 2)).astype(np.float32), rng.integers(0, 2, 30)
    file = write(tmp_path / "a.csv", "u,v,y", *(f"{a},{b},{c}" for (a, b), c in zip(x, y, strict=True)))
    named = hessdiag.load("tiny:2", f"csv:{file}?target=y", loss="cross_entropy")
    plain = hessdiag.Problem(tiny("2"), (torch.tensor(x), torch.tensor(y)), criterion="cross_entropy")
    found, truth = (hessdiag.analyze(one, quantities=["lambda_max", "trace"]) for one in (named, plain))
    assert found.lambda_max.value == pytest.approx(truth.lambda_max.value, rel=1e-5)


# images


def test_a_folder_of_images_is_a_class_a_folder(tmp_path):
    check_folder(tmp_path)


def check_folder(folder):
    found = rows(f"imagefolder:{pictures(folder / 'all')}", model="tiny:2")["train"]
    assert (found.kind, found.classes, len(found.rows)) == ("images", ("cat", "dog"), 6)
    assert [label for _, label in (found.rows[i] for i in range(6))] == [0, 0, 0, 1, 1, 1]
    assert found.rows[4][0].getpixel((0, 0)) == (200, 1, 0)
    for split in ("train", "val"):
        pictures(folder / "split" / split)
    assert list(rows(f"imagefolder:{folder}/split", model="tiny:2")) == ["train", "val"]
    both = rows(f"imagefolder:{folder}/split", f"test=imagefolder:{folder}/split?split=val", model="tiny:2")
    assert list(both) == ["train", "val", "test"]
    picture(folder / "grey" / "a" / "1.png", 7, mode="L")
    picture(folder / "grey" / "b" / "1.png", (9, 9, 9, 0), mode="RGBA")
    grey = rows(f"imagefolder:{folder}/grey?channels=1", model="tiny:2")["train"]
    assert [grey.rows[i][0].getpixel((0, 0)) for i in range(2)] == [7, 9]


def test_images_are_measured_by_a_model_without_transforms(tmp_path):
    problem = hessdiag.load(
        "tiny:48", f"imagefolder:{pictures(tmp_path / 'a')}?size=4&mean=0.5&std=0.5", loss="cross_entropy"
    )
    pixels, label = problem.data["train"][4]
    assert torch.allclose(pixels[:, 0, 0], (torch.tensor([200.0, 1, 0]) / 255 - 0.5) / 0.5)
    assert label == 1
    assert hessdiag.analyze(problem, quantities=["trace"]).trace.value > 0


# data sets that datasets saved


def test_a_saved_data_set_is_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    found = rows(f"hf-disk:{tmp_path}/both")
    assert {split: len(part.rows) for split, part in found.items()} == {"train": 2, "test": 1}
    assert (found["train"].classes, found["train"].rows[0]) == (("bad", "good"), {"text": "a", "label": 1})
    image = Image.new("RGB", (4, 3), (1, 2, 3))
    pictured = datasets.Dataset.from_dict({"img": [image], "label": [1]}).cast_column("img", datasets.Image())
    pictured.save_to_disk(tmp_path / "pictures")
    shown = rows(f"hf-disk:{tmp_path}/pictures?size=4", model="tiny:2")["train"]
    assert (shown.kind, shown.rows[0][1], shown.rows[0][0].getpixel((0, 0))) == ("images", 1, (1, 2, 3))
    encoded = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "other": ["x"]})
    encoded.save_to_disk(tmp_path / "encoded")
    ready = rows(f"hf-disk:{tmp_path}/encoded")["train"]
    assert (ready.kind, sorted(ready.rows[0])) == ("ready", ["input_ids", "labels"])
    with pytest.raises(HessdiagError, match="there are img, label"):
        rows(f"hf-disk:{tmp_path}/pictures?text=words")


# what is wrong is one line


def broken_folder(folder):
    write(folder / "empty.txt", " ")
    (folder / "latin.txt").write_bytes("grüße".encode("latin-1"))
    write(folder / "rows.jsonl", '{"text": "a"}', "{", "")
    write(folder / "list.jsonl", "[1]")
    write(folder / "words.csv", "a,b,y", "1,x,0")
    write(folder / "holes.csv", "a,y", "1,0", ",1")
    write(folder / "infinite.csv", "a,y", "1,0", "inf,1")
    write(folder / "header.csv", "a,y")
    write(folder / "ragged.csv", "a,y", "1,2", "1,2,3,4")
    write(folder / "target.csv", "y", "1")
    pictures(folder / "pictures")
    write(folder / "pictures" / "cat" / "1.png", "none")
    (folder / "bare").mkdir()
    write(folder / "files" / "a" / "x.txt", "none")
    pictures(folder / "uneven" / "train")
    picture(folder / "uneven" / "test" / "cow" / "1.png", (0, 0, 0))
    return folder


BAD = {
    "text:{d}/none.txt": "no such data file",
    "text:{d}/none*.txt": "no file matches",
    "text:{d}/empty.txt": "holds no text",
    "text:{d}/latin.txt": "is not UTF-8",
    "text:{d}/latin.txt?block=0": "at least 1",
    "text:{d}/empty.txt?size=3": "allowed: block",
    "jsonl:{d}/rows.jsonl?text=text": "line 2 is no JSON",
    "jsonl:{d}/list.jsonl?text=text": "line 1 holds a list",
    "csv:{d}/words.csv": "target=NAME",
    "csv:{d}/words.csv?target=z": "no column 'z'; there are a, b, y",
    "csv:{d}/words.csv?target=y": "column 'b', row 1 is 'x'",
    "csv:{d}/words.csv?text=b&target=y": "give one",
    "csv:{d}/words.csv?text=z": "no column 'z'",
    "csv:{d}/words.csv?text=b&label=z": "no column 'z'",
    "csv:{d}/holes.csv?target=y": "column 'a', row 2 is ''",
    "csv:{d}/infinite.csv?target=y": "row 2 is 'inf'",
    "csv:{d}/header.csv?target=y": "no rows",
    "csv:{d}/ragged.csv?target=y": "is no table",
    "csv:{d}/target.csv?target=y": "the only column",
    "csv:{d}/empty.txt?target=y": "holds no text",
    "imagefolder:{d}/none": "no such folder",
    "imagefolder:{d}/bare": "has no subfolders",
    "imagefolder:{d}/files": "has no images",
    "imagefolder:{d}/uneven": "the class 'cow'",
    "imagefolder:{d}/pictures?size=4": "1.png is not read as an image",
    "imagefolder:{d}/pictures?channels=2": "must be 1 (grey) or 3",
    "imagefolder:{d}/pictures?mean=x": "must be a number",
    "text:{d}/rows.jsonl": "this model has no tokenizer",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_data_is_one_line(text, tmp_path):
    broken_folder(tmp_path)
    data = text.format(d=tmp_path)
    code, out, err = call("analyze", "--model", "tiny:2", "--loss", "cross_entropy", "--data", data, "-q")
    assert code in (2, 4), err
    assert out == ""
    assert BAD[text] in err
    assert err.count("\n") == 1, err


def test_a_saved_data_set_that_is_none_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    for place in ("none", "."):
        with pytest.raises(HessdiagError) as caught:
            rows(f"hf-disk:{tmp_path}/{place}")
        assert "\n" not in str(caught.value)


# what these tests must notice


BREAKAGES = {
    "empty cells are read as NaN": (
        lambda patch: patch.setattr(tables, "_plain", lambda frame: frame.replace("NA", None).to_dict("records")),
        check_records,
    ),
    "the target is an input": (
        lambda patch: patch.setattr(tables, "_numbers", lambda frame, target, said: with_target(frame, target)),
        check_numbers,
    ),
    "classes come in the order of the file system": (
        lambda patch: patch.setattr(folders, "_classes", lambda folder, said: ("dog", "cat")),
        check_folder,
    ),
    "files come as text": (
        lambda patch: patch.setattr(texts, "natural", lambda name: name),
        test_a_text_is_one_document_a_file,
    ),
}


def with_target(frame, target):
    values = torch.tensor(frame.to_numpy(np.float32))
    return torch.utils.data.TensorDataset(values, torch.tensor(frame[target].to_numpy()))


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch, tmp_path):
    damage, check = BREAKAGES[name]
    (tmp_path / "sound").mkdir()
    (tmp_path / "broken").mkdir()
    check(tmp_path / "sound")
    damage(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, HessdiagError)):
        check(tmp_path / "broken")
