"""Tiny models of Hugging Face made on the spot, saved by their own library, with data beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind"]
WORDS += ["suffer", "slings", "arrows", "of", "sea", "troubles"]
SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *WORDS)
SMALL = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
GPT2 = {"vocab_size": 24, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 16, "n_inner": 4, **SMALL}
WIDTHS = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
BERT = {"vocab_size": 24, "max_position_embeddings": 16, "pad_token_id": 1, **WIDTHS}
NAMES = {0: "bad", 1: "fair", 2: "good"}


def tokenizer(folder: Path, *, more: int = 0, pad: str | None = "[PAD]") -> None:
    """One token a word, with [CLS] and [SEP] around a text."""
    vocabulary = {word: place for place, word in enumerate((*VOCABULARY, *(f"more{i}" for i in range(more))))}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        unk_token="[UNK]",
        pad_token=pad,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def _config(config: type, sizes: dict, options: dict) -> object:
    return config(**{**sizes, **options})


def gpt2(**options):
    return transformers.GPT2LMHeadModel(_config(transformers.GPT2Config, GPT2, options))


def llama(**options):
    sizes = {"vocab_size": 24, "max_position_embeddings": 16, "num_key_value_heads": 1, **WIDTHS, **SMALL}
    return transformers.LlamaForCausalLM(_config(transformers.LlamaConfig, sizes, options))


def mixtral(**options):
    sizes = {"vocab_size": 24, "max_position_embeddings": 16, "num_key_value_heads": 1, "num_local_experts": 2}
    sizes |= {"num_experts_per_tok": 1}
    sizes |= {"output_router_logits": True, "router_aux_loss_coef": 0.1, **WIDTHS, **SMALL}
    return transformers.MixtralForCausalLM(_config(transformers.MixtralConfig, sizes, options))


def classifier(**options):
    sizes = {**BERT, "id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    return transformers.BertForSequenceClassification(_config(transformers.BertConfig, sizes, options))


def gpt2_classifier(**options):
    return transformers.GPT2ForSequenceClassification(
        _config(transformers.GPT2Config, {**GPT2, "num_labels": 3}, options)
    )


def tagger(**options):
    return transformers.BertForTokenClassification(
        _config(transformers.BertConfig, {**BERT, "num_labels": 3}, options)
    )


def masked(**options):
    return transformers.BertForMaskedLM(_config(transformers.BertConfig, BERT, options))


def vit(**options):
    sizes = {"image_size": 4, "patch_size": 2, "num_labels": 2, **WIDTHS}
    return transformers.ViTForImageClassification(_config(transformers.ViTConfig, sizes, options))


def save(folder: Path, model: nn.Module, **options) -> Path:
    """The model with weights that are not those it was initialised with, and its tokenizer."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if isinstance(model, transformers.ViTForImageClassification):
        transformers.ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder)
    else:
        tokenizer(folder, **options)
    return folder


def texts(folder: Path, count: int = 40) -> Path:
    """A text of so many words."""
    rng = np.random.default_rng(0)
    file = folder / "words.txt"
    file.write_text(" ".join(rng.choice(WORDS, count)))
    return file


def records(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sentences(count: int = 5) -> list[str]:
    """Texts of different lengths."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, 2 + 2 * index % 7)) for index in range(count)]


def pictures(folder: Path) -> Path:
    """Two classes of three images each, of different sizes."""
    rng = np.random.default_rng(2)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 255, (6 + index, 5, 3), "uint8")
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
