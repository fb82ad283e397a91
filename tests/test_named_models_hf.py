"""Promise: a folder of Hugging Face by name has the loss, gradient and Hessian of its own library. (50 s)

Every model is made here, tiny, with random weights, and saved by its library. The truth is that library's: its
`from_pretrained`, its tokenizer, its `model(**batch, labels=labels).loss`, and a dense Hessian of that.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.utils import logging

import hessdiag
from hessdiag.schemes.assemble import build
from hessdiag.schemes.models.hf import labels as hf_labels
from hessdiag.schemes.models.hf import model as hf_model
from hessdiag.schemes.models.hf import texts as hf_texts
from hessdiag.schemes.recipe import Recipe
from tests import hf_folders as make
from tests.command import call
from tests.hostile_pickles import hostile

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever wants to fetch something fails."""

    def refuse(*_, **__):
        pytest.fail("something was to be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# the library's own loss on the same examples


def of_text(folder, data, block):
    own = transformers.AutoTokenizer.from_pretrained(folder)
    ids = own(Path(data).read_text(), add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids[: len(ids) // block * block]).reshape(-1, block)
    return {"input_ids": ids, "labels": ids}


def of_records(folder, rows, targets):
    own = transformers.AutoTokenizer.from_pretrained(folder)
    columns = [[row[name] for row in rows] for name in ("text", "text_pair") if name in rows[0]]
    batch = dict(own(*columns, padding=True, return_tensors="pt"))
    return {**batch, "labels": targets(batch)}


def causal(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def library(auto, folder, **options):
    return getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", **options).eval()


LABELS = ("good", "bad", "fair", "good", "bad")
INDEX = [["bad", "fair", "good"].index(label) for label in LABELS]
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def blocks_of(model, **options):
    def case(folder):
        place, file = make.save(folder / "m", model(**options)), make.texts(folder)
        return place, f"text:{file}?block=8", CAUSAL, of_text(place, file, 8)

    return case


def rows_of(model, label, targets, auto=CLASSIFIER, **options):
    def case(folder):
        rows = [{"text": text, "label": label(i)} for i, text in enumerate(make.sentences())]
        place = make.save(folder / "m", model(**options))
        data = f"jsonl:{make.records(folder, rows)}"
        return place, data, auto, of_records(place, rows, targets)

    return case


def pairs(folder):
    texts = make.sentences()
    rows = [{"text": a, "text_pair": b, "label": i} for a, b, i in zip(texts, texts[::-1], INDEX, strict=True)]
    place = make.save(folder / "m", make.classifier())
    data = f"jsonl:{make.records(folder, rows)}?text_pair=text_pair"
    return place, data, CLASSIFIER, of_records(place, rows, lambda batch: torch.tensor(INDEX))


def tags(folder):
    rows = [{"text": text.split(), "label": [len(w) % 3 for w in text.split()]} for text in make.sentences()]
    place = make.save(folder / "m", make.tagger())
    own = transformers.AutoTokenizer.from_pretrained(place)
    batch = own([row["text"] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for place_, row in enumerate(rows):
        labels[place_, 1 : 1 + len(row["label"])] = torch.tensor(row["label"])  # behind [CLS], one token a word
    data = f"jsonl:{make.records(folder, rows)}"
    return place, data, "AutoModelForTokenClassification", {**batch, "labels": labels}


def images(folder):
    place, data = make.save(folder / "m", make.vit()), make.pictures(folder / "pictures")
    own = transformers.AutoImageProcessor.from_pretrained(place)
    files = sorted(data.rglob("*.png"))
    from PIL import Image

    pixels = own([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([file.parent.name == "dog" for file in files]).long()
    batch = {"pixel_values": pixels, "labels": labels}
    return place, f"imagefolder:{data}", "AutoModelForImageClassification", batch


def masked(folder):
    place, file = make.save(folder / "m", make.masked()), make.texts(folder)
    return place, f"text:{file}?block=8", "AutoModelForMaskedLM", None


FAMILIES = {
    "causal, tied": blocks_of(make.gpt2),
    "causal, untied": blocks_of(make.llama),
    "causal, padded": rows_of(make.gpt2, lambda i: None, causal, CAUSAL),
    "causal, experts with an auxiliary loss": blocks_of(make.mixtral),
    "causal, experts, padded": rows_of(make.mixtral, lambda i: None, causal, CAUSAL),
    "classes": rows_of(make.classifier, lambda i: LABELS[i], lambda batch: torch.tensor(INDEX)),
    "classes of pairs": pairs,
    "classes, last token": rows_of(make.gpt2_classifier, lambda i: INDEX[i], lambda batch: torch.tensor(INDEX)),
    "several labels": rows_of(
        make.classifier,
        lambda i: [i % 2, 1, 0],
        lambda batch: torch.tensor([[i % 2, 1.0, 0] for i in range(5)]),
        problem_type="multi_label_classification",
    ),
    "regression": rows_of(
        make.classifier,
        lambda i: i / 2,
        lambda batch: torch.arange(5.0) / 2,
        num_labels=1,
        id2label={0: "x"},
        label2id={"x": 0},
    ),
    "tokens": tags,
    "masked": masked,
    "images": images,
}
OWN = ("causal, experts with an auxiliary loss", "causal, experts, padded")  # whose loss is no criterion


def dense(model, batches):
    """Loss, gradient and Hessian of the library's own loss by all its trainable parameters.

    Several batches count by the tokens that they predict.
    """
    terms = [int((batch["labels"][..., 1:] != -100).sum()) for batch in batches] if len(batches) > 1 else [1]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(*values):
        given = dict(zip(named, values, strict=True))
        parts = [torch.func.functional_call(model, given, (), dict(batch)).loss for batch in batches]
        return sum(n * part for n, part in zip(terms, parts, strict=True)) / sum(terms)

    values = tuple(p.detach().clone().requires_grad_() for p in named.values())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*values), values)])
    blocks = torch.autograd.functional.hessian(loss, values)
    H = torch.cat(
        [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(values, blocks, strict=True)]
    )
    return float(loss(*values).detach()), gradient, H.double()


def measured(problem, samples):
    """Loss and gradient as the problem weighs its batches."""
    counts = sum(problem.count(batch) for batch in samples.batches)
    parameters = [dict(problem.model.named_parameters())[name] for name in problem.parameter_names()]
    total = sum(problem.total(problem.model, batch) for batch in samples.batches) / counts
    gradient = torch.autograd.grad(total, parameters)
    return float(total.detach()), torch.cat([g.reshape(-1) for g in gradient])


def check_equal(problem, model, batch):
    samples = hessdiag.draw(problem.data["train"], samples=100, batch_size=2)
    # an auxiliary loss depends on what stands in a batch together
    loss, gradient, H = dense(model, [batch] if problem.built_in is not None else samples.batches)
    own_loss, own_gradient = measured(problem, samples)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(own_gradient, gradient, rtol=1e-3, atol=1e-5)
    op = hessdiag.Curvature(problem, samples)
    v = torch.randn(op.size, 3, generator=torch.Generator().manual_seed(0))
    products = torch.stack([op @ one for one in v.T], 1)
    assert float((products - H @ v.double()).norm()) < 1e-3 * float((H @ v.double()).norm())
    asked = {"samples": samples.examples, "batch_size": 2, "probes": 30, "second_opinion": False}
    found = hessdiag.analyze(problem, quantities=["lambda_max", "trace"], **asked)
    assert found.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=2e-3)
    half = (found.trace.hi - found.trace.lo) / 2
    assert abs(found.trace.value - float(H.trace())) < 2 * half + 1e-3 * float(H.norm())


def named(folder, data, **options):
    return hessdiag.load(f"hf:{folder}", data, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_hessian_are_the_librarys(family, tmp_path):
    check_family(family, tmp_path)


def test_a_loss_that_was_asked_for_is_measured_beside_the_models_own(tmp_path):
    """The model's own is the plain cross-entropy: that differs, and is a note."""
    texts, labels = make.sentences(), LABELS
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    place = make.save(tmp_path / "m", make.classifier())
    data = f"jsonl:{make.records(tmp_path, rows)}"
    smooth = named(place, data, loss="CrossEntropyLoss(label_smoothing=0.3)")
    found = hessdiag.analyze(smooth, quantities=["lambda_max"])
    batch = of_records(place, rows, lambda batch: torch.tensor(INDEX))
    model = library(CLASSIFIER, place)
    logits = model(**batch).logits
    wanted = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
    assert found.second_opinion.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert any("another loss was asked for" in note for note in found.notes)


def check_family(family, tmp_path):
    place, data, auto, batch = FAMILIES[family](tmp_path)
    problem = named(place, data)
    assert (problem.built_in is None) == (family in OWN)
    check_equal(problem, library(auto, place), batch or problem.data["train"])


def test_tokens_are_masked_by_the_text_alone(tmp_path):
    place, data, _, _ = masked(tmp_path)
    columns = named(place, data).data["train"]
    whole = of_text(place, data[5:].partition("?")[0], 6)["input_ids"]
    ids, labels = columns["input_ids"], columns["labels"]
    assert ids[:, 0].unique().tolist() == [2]
    assert ids[:, -1].unique().tolist() == [3]
    assert bool((labels[:, [0, -1]] == -100).all())
    chosen = labels[:, 1:-1] != -100
    assert bool(chosen.any(1).all())
    assert torch.equal(labels[:, 1:-1][chosen], whole[chosen])
    assert torch.equal(ids[:, 1:-1][~chosen], whole[~chosen])
    again = named(place, data, options={"seed": 3, "mask": 0.9}).data["train"]
    assert (again["labels"] != -100).sum() > 2 * chosen.sum()
    assert torch.equal(named(place, data).data["train"]["input_ids"], ids)


@pytest.mark.parametrize("family", ["classes", "causal, padded"])
def test_rows_that_are_tokens_already_are_padded(family, tmp_path):
    datasets = pytest.importorskip("datasets")
    place, _, auto, batch = FAMILIES[family](tmp_path)
    columns = [column.tolist() for column in batch.values()]
    rows = [dict(zip(batch, one, strict=True)) for one in zip(*columns, strict=True)]
    for row in rows:
        length = sum(row["attention_mask"])
        row |= {name: value[:length] for name, value in row.items() if isinstance(value, list)}
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "tokens")
    check_equal(named(place, f"hf-disk:{tmp_path}/tokens"), library(auto, place), batch)
    for tokens, words in (([3] * 20, "takes 16 at most"), ([99], "has 24 rows")):
        datasets.Dataset.from_dict({"input_ids": [tokens], "labels": [0]}).save_to_disk(tmp_path / words)
        if family == "classes":
            assert words in refusal("doctor", "--model", f"hf:{place}", "--data", f"hf-disk:{tmp_path}/{words}")


# weights


def test_weights_come_from_the_checkpoint(tmp_path):
    place, data, auto, _ = FAMILIES["causal, tied"](tmp_path)
    other = make.save(tmp_path / "run" / "checkpoint-7", make.gpt2())
    model = library(auto, other)
    nn.init.constant_(model.transformer.wpe.weight, 0.25)
    model.save_pretrained(other)
    state = {"log_history": [{"learning_rate": 0.5}, {"loss": 1}, {"learning_rate": 0.25}], "epoch": 2.0}
    (other / "trainer_state.json").write_text(json.dumps({**state, "global_step": 7}))
    for problem in (
        named(place, data, checkpoint=other / "model.safetensors"),
        named(place, data, checkpoint=other),
        hessdiag.load("hf:", data, checkpoint=other),
        hessdiag.load("hf:", data, checkpoint=other / "model.safetensors"),
    ):
        assert bool((problem.model.transformer.wpe.weight == 0.25).all())
        assert problem.meta == {"lr": 0.25, "adaptive": True, "epoch": 2.0, "step": 7}
    assert named(place, data).meta == {}


def test_half_precision_is_measured_in_float32(tmp_path):
    place, data, auto, batch = FAMILIES["causal, untied"](tmp_path)
    library(auto, place).bfloat16().save_pretrained(place)
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    check_equal(named(place, data), library(auto, place, dtype=torch.float32), batch)


def test_generators_and_the_librarys_settings_stay(tmp_path):
    place, data, _, _ = FAMILIES["classes"](tmp_path)
    logging.set_verbosity_info()
    before = torch.get_rng_state()
    named(place, data)
    assert torch.equal(before, torch.get_rng_state())
    assert logging.get_verbosity() == logging.INFO
    logging.set_verbosity_warning()


# adapters


def adapter(folder, model, place, **options):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what PEFT asks transformers
        whole = peft.get_peft_model(model, peft.LoraConfig(r=1, **options))
    generator = torch.Generator().manual_seed(5)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    whole.save_pretrained(folder / place)
    return folder / place


CONV1D = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
ADAPTERS = {
    "causal": ("causal, padded", {**CONV1D, "task_type": "CAUSAL_LM"}),
    "with the head, saved whole": ("classes", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_hessian_of_an_adapter_is_over_its_parameters(case, tmp_path):
    peft = pytest.importorskip("peft")
    family, options = ADAPTERS[case]
    place, data, auto, batch = FAMILIES[family](tmp_path)
    folder = adapter(tmp_path, library(auto, place), "a", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        whole = peft.PeftModel.from_pretrained(library(auto, place), folder, is_trainable=True).eval()
    problem = named(place, data, adapter=folder)
    assert all("lora" in name or "modules_to_save" in name for name in problem.parameter_names())
    check_equal(problem, whole, batch)
    samples = hessdiag.draw(problem.data["train"])
    for other in (named(place, data, checkpoint=folder), hessdiag.load("hf:", data, checkpoint=folder)):
        assert measured(other, samples)[0] == measured(problem, samples)[0]


def test_an_adapter_of_another_base_is_told(tmp_path):
    place, data, auto, _ = FAMILIES["causal, tied"](tmp_path)
    folder = adapter(tmp_path, library(auto, place), "a", **CONV1D)
    shutil.copytree(place, tmp_path / "other")
    built = build(Recipe.of(f"hf:{tmp_path}/other", data=data, adapter=str(folder)))
    assert any("names the base model" in note for note in built.notes)
    built = build(Recipe.of(f"hf:{place}", data=data, adapter=str(folder)))
    assert not any("names the base model" in note for note in built.notes)


# labels


def test_classes_are_matched_by_their_names():
    config = SimpleNamespace(num_labels=2, id2label={0: "dog", 1: "cat"}, problem_type=None)
    own = hf_labels.Labels(config)
    assert own.targets([0, 1], ("cat", "dog"), "d").tolist() == [1, 0]
    assert any("by their names" in note for note in own.notes)
    assert hf_labels.Labels(config).targets(["dog", 1.0], (), "d").tolist() == [0, 1]
    strange = hf_labels.Labels(config)
    assert strange.targets([0, 1], ("chat", "chien"), "d").tolist() == [0, 1]
    assert any("by index" in note for note in strange.notes)
    for classes in (("cat", "cow"), ("a", "b", "c")):
        with pytest.raises(hessdiag.HessdiagError):
            hf_labels.Labels(config).targets([0], classes, "d")


# what is wrong is one line, nothing is run, nothing is fetched


def change(name, **values):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


def without(name, key):
    def damage(folder):
        file = folder / name
        found = json.loads(file.read_text())
        del found[key]
        file.write_text(json.dumps(found))

    return damage


def write(name, content):
    def damage(folder):
        (folder / name).write_bytes(content) if isinstance(content, bytes) else (folder / name).write_text(content)

    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def custom_code(folder):
    mark = f"open({str(folder / 'ran')!r}, 'w')\n"
    (folder / "mine.py").write_text(mark + "class Mine: pass\n")
    change("config.json", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})(folder)


def custom_tokenizer(folder):
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    change("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})(folder)


def pickled(folder):
    gone("model.safetensors")(folder)
    _, content = next(hostile(str(folder / "ran")))
    (folder / "pytorch_model.bin").write_bytes(content)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def edited(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def of_bert(folder):
    """The configuration of another model."""
    shutil.copy(make.save(folder.parent / "bert", make.masked()) / "config.json", folder)


def more_words(folder):
    make.tokenizer(folder, more=20)
    (folder.parent / "words.txt").write_text("to be more3 more17 " * 30)


def text(content):
    return lambda folder: (folder.parent / "words.txt").write_bytes(content)


BROKEN = {
    "no config.json": (gone("config.json"), "has no config.json"),
    "config.json is no JSON": (write("config.json", "{"), "is no JSON"),
    "config.json is a list": (write("config.json", "[]"), "an object is needed"),
    "no architectures": (without("config.json", "architectures"), "names no architectures"),
    "no model_type": (without("config.json", "model_type"), "has no model_type"),
    "unknown architecture": (change("config.json", architectures=["T5ForConditionalGeneration"]), "FACTORY"),
    "backbone": (change("config.json", architectures=["GPT2Model"]), "allowed: causal language model"),
    "model_type of another": (change("config.json", model_type="bert"), "has no class GPT2LMHeadModel"),
    "config.json of another": (of_bert, "does not fit the model"),
    "sizes that cannot be": (change("config.json", n_head=3), "cannot be built"),
    "custom code": (custom_code, "--trust-remote-code"),
    "custom tokenizer": (custom_tokenizer, "--trust-remote-code"),
    "quantized": (change("config.json", quantization_config={"quant_method": "gptq"}), "no Hessian"),
    "no tokenizer": (gone("tokenizer.json"), "has no tokenizer"),
    "damaged tokenizer": (write("tokenizer.json", "{}"), "not read as a tokenizer"),
    "tokenizer of another": (more_words, "the model's embedding has 24 rows"),
    "no weights": (gone("model.safetensors"), "a folder without model.safetensors"),
    "pickled weights": (pickled, "pytorch_model.bin"),
    "weights cut short": (cut, "model.safetensors"),
    "NaN": (edited(lambda state: state["transformer.wpe.weight"].fill_(torch.nan)), "NaN or infinity"),
    "a tensor is missing": (edited(lambda state: state.pop("transformer.wpe.weight")), "missing: transformer.wpe"),
    "a tensor too many": (edited(lambda state: state.update(x=torch.ones(2))), "unexpected: x"),
    "empty text": (text(b" \n"), "holds no text"),
    "short text": (text(b"to be"), "has 2 tokens; a block needs 8"),
    "not UTF-8": (text(b"\xff\xfe" * 40), "is not UTF-8"),
}


def refusal(*arguments):
    code, out, err = call(*arguments)
    assert code in (2, 4), err
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(name, tmp_path):
    place, data, _, _ = FAMILIES["causal, tied"](tmp_path)
    damage, words = BROKEN[name]
    damage(place)
    assert words in refusal("doctor", "--model", f"hf:{place}", "--data", data)
    assert not (place / "ran").exists()


CLASSES = {
    "wrong number of classes": (
        change("config.json", id2label=dict.fromkeys(range(5), "x")),
        "of classes?",
    ),
    "no head": (edited(lambda state: state.pop("classifier.weight")), "missing: classifier.weight"),
    "label out of range": (3, "out of range: the model has 3 classes"),
    "unknown label": ("awful", "none of the model's: bad, fair, good"),
    "no label": (None, "row 1 has no label"),
    "fraction": (0.5, "is no class"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_labels_that_are_none_are_one_line(name, tmp_path):
    place, data, _, _ = FAMILIES["classes"](tmp_path)
    damage, words = CLASSES[name]
    if callable(damage):
        damage(place)
    else:
        make.records(tmp_path, [{"text": "to be", "label": damage}])
    assert words in refusal("doctor", "--model", f"hf:{place}", "--data", data)


def lora(**values):
    def damage(folder):
        if values:
            change("adapter_config.json", **values)(folder)

    return damage


ADAPTED = {
    "no weights": (gone("adapter_model.safetensors"), "a folder without"),
    "no configuration": (gone("adapter_config.json"), "has no adapter_config.json"),
    "another kind": (lora(peft_type="NO_SUCH"), "is not read by PEFT"),
    "of prompts": (
        lambda folder: (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2})
        ),
        "adds inputs, not weights",
    ),
    "of another model": (lora(target_modules=["q_proj"]), "does not fit the model"),
    "of another rank": (lora(r=3), "does not fit the model"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_a_broken_adapter_is_one_line(name, tmp_path):
    place, data, auto, _ = FAMILIES["causal, tied"](tmp_path)
    folder = adapter(tmp_path, library(auto, place), "a", **CONV1D)
    damage, words = ADAPTED[name]
    damage(folder)
    assert words in refusal("doctor", "--model", f"hf:{place}", "--adapter", str(folder), "--data", data)


def asked(place, folder):
    """What is asked wrongly of a sound folder."""
    words = f"text:{folder}/words.txt"
    return {
        "a name of the hub": (("hf:org/name", "--data", words), "--allow-download"),
        "a path that is none": ((f"hf:{folder}/no/such", "--data", words), "no such folder"),
        "a file": ((f"hf:{place}/model.safetensors", "--data", words), "is a file"),
        "no folder": (("hf:", "--data", words), "names no folder"),
        "another folder with -c": (("hf:", "-c", str(folder), "--data", words), "has no config.json"),
        "an unknown option": ((f"hf:{place}?tokens=3", "--data", words), "allowed: mask, seed"),
        "a mask that is none": ((f"hf:{place}?mask=2", "--data", words), "must be a share"),
        "a block too long": ((f"hf:{place}", "--data", f"{words}?block=99"), "takes 16 tokens at most"),
        "images": ((f"hf:{place}", "--data", f"imagefolder:{folder}/pictures"), "holds images"),
        "no column": ((f"hf:{place}", "--data", f"jsonl:{folder}/rows.jsonl"), "no column 'text'"),
        "no data": ((f"hf:{place}",), "no data; give --data"),
    }


@pytest.mark.parametrize("name", asked("", ""))
def test_what_cannot_be_asked_is_one_line(name, tmp_path):
    place, _, _, _ = FAMILIES["causal, tied"](tmp_path)
    make.pictures(tmp_path / "pictures")
    make.records(tmp_path, [{"words": "to be"}])
    arguments, words = asked(place, tmp_path)[name]
    assert words in refusal("doctor", "--model", *arguments)


def test_texts_of_several_lengths_need_a_padding_token(tmp_path):
    place, data, _, _ = FAMILIES["classes, last token"](tmp_path)
    make.tokenizer(place, pad=None)
    assert "pad_token" in refusal("doctor", "--model", f"hf:{place}", "--data", data)


def test_code_is_run_once_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    place, data, _, _ = FAMILIES["causal, tied"](tmp_path)
    (place / "mine.py").write_text("from transformers import GPT2LMHeadModel\nclass Mine(GPT2LMHeadModel): pass\n")
    change("config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"}, architectures=["Mine"])(place)
    assert type(named(place, data, trust_remote_code=True).model).__name__ == "Mine"


def test_names_of_the_hub_are_fetched_once_it_is_allowed(tmp_path, monkeypatch):
    import huggingface_hub

    place, data, _, _ = FAMILIES["causal, tied"](tmp_path)
    seen = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        seen.append((name, local_files_only))
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hessdiag.load("hf:org/name", data, allow_download=True)
    hessdiag.load("hf:org/name", data)  # out of the cache
    assert seen == [("org/name", False), ("org/name", True)]


# verbs


def test_gap_takes_folders_as_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text.split(), "label": ["LABEL_1"] * len(text.split())} for text in make.sentences(20)]
    data = f"jsonl:{make.records(tmp_path, rows)}"
    for step in (1, 2, 3):
        make.save(tmp_path / "runs" / f"checkpoint-{step}", make.tagger(), more=0)
    code, out, err = call(
        *("gap", "--model", "hf:", "-c", "runs/checkpoint-*", "--data", f"train={data}", "--data", f"test={data}"),
        *("--measures", "trace", "--samples", "5", "--no-guard", "--json", "-q"),
    )
    assert code == 0, err
    found = json.loads(out)["records"]
    splits = [split for record in found for split in record["performance"]["splits"]]
    assert [split["n"] for split in splits] == [sum(len(row["text"]) for row in rows)] * 6
    assert all(0 <= split["score"]["value"] <= 1 for split in splits)


def test_print_config_says_what_was_found(tmp_path):
    place, data, _, _ = FAMILIES["causal, tied"](tmp_path)
    code, out, _ = call("analyze", "--model", f"hf:{place}", "--data", data, "--print-config", "--json")
    rows = {row["what"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert code == 0
    assert rows["architecture"] == ("GPT2LMHeadModel, causal language model", f"{place}/config.json")
    assert rows["loss"] == ("causal_lm/mean", "the model's own")
    assert rows["mean over"][0].startswith("the tokens but the first")
    assert rows["weights"][0] == f"{place}/model.safetensors"
    assert "23 tokens" in rows["tokenizer"][0]


PAGE = Path(hessdiag.__file__).parent / "docs" / "schemes.md"
LINES = re.findall(r"^    \$ hessdiag (.*)$", PAGE.read_text(), re.MULTILINE)


def test_the_lines_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.save(tmp_path / "my-gpt2", make.gpt2())
    adapter(tmp_path, library(CAUSAL, tmp_path / "my-gpt2"), "my-lora", **CONV1D)
    for place in ("my-bert", "runs/checkpoint-1", "runs/checkpoint-2"):
        make.save(tmp_path / place, make.classifier())
    rows = [{"text": text, "label": index % 3} for index, text in enumerate(make.sentences(12))]
    make.texts(tmp_path, 200).rename("corpus.txt")
    for name in ("reviews", "a", "b"):
        make.records(tmp_path, rows).rename(f"{name}.jsonl")
    assert len(LINES) == 4
    for line in LINES:
        words = shlex.split(line)
        quick = ["--measures", "trace", "--no-guard"] if words[0] == "gap" else ["--quantities", "trace"]
        code, _, err = call(*words, *quick, "--samples", "8", "-q")
        assert code == 0, err


# what these tests must notice


COUNT = itertools.count()
BREAKAGES = {
    "padding counts": (
        lambda patch: patch.setattr(hf_texts, "IGNORE_INDEX", 1),
        lambda folder: check_family("causal, padded", folder),
    ),
    "labels are those of the data": (
        lambda patch: patch.setattr(
            hf_labels.Labels, "lookup", lambda self, classes, text: lambda label: LABELS.index(label)
        ),
        lambda folder: check_family("classes", folder),
    ),
    "every token of a record has a label": (
        lambda patch: patch.setattr(hf_texts, "of_words", lambda words, tags: [0 for _ in words]),
        lambda folder: check_family("tokens", folder),
    ),
    "the auxiliary loss is left out": (
        lambda patch: patch.setattr(hf_model, "differs", lambda *_: None),
        lambda folder: check_family("causal, experts with an auxiliary loss", folder),
    ),
    "the model keeps its own weights": (
        lambda patch: patch.setattr(
            hf_model, "loaded", lambda model, config, path, **_: (model, hessdiag_weights(path), [])
        ),
        test_weights_come_from_the_checkpoint,
    ),
    "batches count by their rows": (
        lambda patch: patch.setattr(hf_model, "terms_of", lambda criterion: lambda batch: len(batch["labels"])),
        lambda folder: check_family("causal, experts, padded", folder),
    ),
    "masks are drawn anew": (
        lambda patch: patch.setattr(hf_texts.zlib, "crc32", lambda _: next(COUNT)),
        test_tokens_are_masked_by_the_text_alone,
    ),
    "classes are taken by index": (
        lambda patch: patch.setattr(hf_labels.Labels, "_places", lambda self, classes, text: {}),
        lambda folder: test_classes_are_matched_by_their_names(),
    ),
}


def hessdiag_weights(path):
    from hessdiag.sources.weights import read_weights

    return read_weights(path)


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch, tmp_path):
    damage, check = BREAKAGES[name]
    check(tmp_path / "sound")
    damage(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, hessdiag.HessdiagError)):
        check(tmp_path / "broken")
