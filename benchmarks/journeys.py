"""Eight users with what they have, and what each must type: commands and lines of their own, run and counted."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from benchmarks.tables import circumstances
from hessdiag.files import write_whole

HEAD = """Each row is run: what the user has is made by the library they use, with random weights; then the
commands are typed as they stand here. *lines* are those of Python that they write for hessdiag."""


@dataclass(frozen=True)
class Journey:
    """One user.

    Attributes:
        user: who.
        needs: libraries.
        has: makes what they have before they hear of hessdiag, in the current folder; a Python program.
        commands: what they type.
        files: what they write for hessdiag, by name.
    """

    user: str
    needs: tuple[str, ...]
    has: str
    commands: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()

    @property
    def lines(self) -> int:
        """Lines of their own."""
        return sum(len(text.strip().splitlines()) for _, text in self.files)


TEXTS = """
import json, random
random.seed(0)
words = "a model learns what the data say and forgets the rest of it".split()
sentences = [" ".join(random.choices(words, k=9)) for _ in range(60)]
open("corpus.txt", "w").write(" ".join(sentences * 4))
with open("reviews.jsonl", "w") as file:
    for i, text in enumerate(sentences):
        file.write(json.dumps({"text": text, "label": i % 2}) + "\\n")
"""
TOKENIZER = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = "a model learns what the data say and forgets the rest of it".split()
known = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(words)])}
tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
"""
GPT2 = """
from transformers import GPT2Config, GPT2LMHeadModel
sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(known))
model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0))
model.save_pretrained("gpt2"); fast.save_pretrained("gpt2")
"""
PICTURES = """
import numpy as np
from pathlib import Path
from PIL import Image
rng = np.random.default_rng(0)
for name in ("cat", "dog"):
    Path("pictures", name).mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), "uint8")).save(f"pictures/{name}/{i}.png")
"""
LOOP = """
import torch, hessdiag
from torch import nn
from hessdiag.sources.datasets import digits
images, _ = digits()
loader = torch.utils.data.DataLoader(images, batch_size=128, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer, loss_fn, step = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), 0
{tracker}
for _ in range(2):
    for x, y in loader:
        optimizer.zero_grad(); loss_fn(model(x), y).backward(); optimizer.step(); step += 1
        {step}
{plot}
"""
LIT = """
import torch, torch.nn.functional as F
from torch import nn
from hessdiag.sources.datasets import digits
import pytorch_lightning as pl
class Net(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(digits()[0], batch_size=128)
"""
FIT = """
import warnings; warnings.filterwarnings("ignore")
open("net.py", "w").write(LIT)
import pytorch_lightning as pl
from net import Net
off = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **off)
trainer.fit(Net()); trainer.save_checkpoint("last.ckpt")
"""
QUICK = "--samples 12 --quantities lambda_max,trace --effort quick"
TRACKED = {
    "tracker": 'tracker = hessdiag.Tracker((model, loss_fn, loader), every=10, quantities=["lambda_max"])',
    "step": "tracker.step(step, lr=0.1)",
    "plot": 'tracker.plot().savefig("sharpness.png")',
}
JOURNEYS = (
    Journey(
        "timm",
        ("timm",),
        PICTURES
        + """
import argparse, timm, torch
model = timm.create_model("test_resnet", num_classes=2)
args = argparse.Namespace(model="test_resnet", num_classes=2, img_size=32, smoothing=0.1)
torch.save({"state_dict": model.state_dict(), "args": args}, "last.pth.tar")
""",
        (f"hessdiag analyze --model timm: -c last.pth.tar --data imagefolder:pictures {QUICK}",),
    ),
    Journey(
        "torchvision",
        ("torchvision",),
        PICTURES
        + """
import torch, torchvision
torch.save({"model": torchvision.models.squeezenet1_1(num_classes=2).state_dict()}, "last.pth")
""",
        (
            "hessdiag analyze --model torchvision:squeezenet1_1 -c last.pth "
            f"--data 'imagefolder:pictures?mean=0.5&std=0.2' {QUICK}",
        ),
    ),
    Journey(
        "Hugging Face, classification",
        ("transformers",),
        TEXTS
        + TOKENIZER
        + """
from transformers import BertConfig, BertForSequenceClassification
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(known))).save_pretrained("bert")
fast.save_pretrained("bert")
""",
        (f"hessdiag analyze --model hf:bert --data jsonl:reviews.jsonl {QUICK}",),
    ),
    Journey(
        "Hugging Face, causal language model",
        ("transformers",),
        TEXTS + TOKENIZER + GPT2,
        (f"hessdiag analyze --model hf:gpt2 --data 'text:corpus.txt?block=16' {QUICK}",),
    ),
    Journey(
        "LoRA",
        ("transformers", "peft"),
        TEXTS
        + TOKENIZER
        + GPT2
        + """
from peft import LoraConfig, get_peft_model
get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained("lora")
""",
        (f"hessdiag analyze --model hf:gpt2 --adapter lora --data 'text:corpus.txt?block=16' {QUICK}",),
    ),
    Journey(
        "Lightning",
        ("pytorch_lightning",),
        f"LIT = {LIT!r}\n{FIT}",
        (f"hessdiag analyze --model lightning:net.py:Net -c last.ckpt {QUICK}",),
    ),
    Journey(
        "plain loop, sharpness during training",
        (),
        "",
        ("python train.py",),
        (("train.py", "\n".join(TRACKED.values())),),
    ),
    Journey(
        "continuous integration",
        ("pytorch_lightning",),
        f"LIT = {LIT!r}\n{FIT}",
        (
            "hessdiag init --model lightning:net.py:Net -c last.ckpt --samples 64 -q",
            "hessdiag check -q",
        ),
    ),
)


def run(only: tuple[str, ...] = ()) -> pd.DataFrame:
    """Every journey whose libraries are there, in a folder and processes of its own."""
    rows = []
    for journey in JOURNEYS:
        if only and not any(word.lower() in journey.user.lower() for word in only):
            continue
        missing = [name for name in journey.needs if find_spec(name) is None]
        took = "not run: no " + " and ".join(missing) if missing else _tried(journey)
        typed = "<br>".join(f"`{command.replace(f' {QUICK}', '')}`" for command in journey.commands)
        rows.append((journey.user, typed, len(journey.commands), journey.lines, took))
    return pd.DataFrame(rows, columns=["user", "what they type", "commands", "lines", "ran"])


def _tried(journey: Journey) -> str:
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, "-c", journey.has], folder)
        for name, text in journey.files:
            whole = LOOP.format(**TRACKED) if name == "train.py" else text
            Path(folder, name).write_text(whole)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for command in journey.commands:
            typed = command.replace("hessdiag ", f"{sys.executable} -m hessdiag ", 1)
            _run(["bash", "-c", typed.replace("python train", f"{sys.executable} train")], folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} s of CPU time"


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"{' '.join(command)[-300:]}: exit code {done.returncode}: {done.stderr[-800:]}"
        raise RuntimeError(msg)


def report(found: pd.DataFrame) -> str:
    """The table as a page."""
    lines = [f"| {' | '.join(found.columns)} |", "|" + "---|" * len(found.columns)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in found.itertuples(index=False)]
    return f"# What eight users type\n\n{HEAD}\n\n{circumstances()}\n\n" + "\n".join(lines) + "\n"


def save(found: pd.DataFrame, folder: Path) -> None:
    """Write journeys.md."""
    write_whole(folder / "journeys.md", report(found))
