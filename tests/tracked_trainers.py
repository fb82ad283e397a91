"""What the tests of the callbacks train: tiny models under Lightning and transformers, on one rank or two."""

from __future__ import annotations

import os
import socket

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EVERY, STEPS = 3, 8


def data(rows=48):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def lightning_module(home):
    """A module of that library, which logs in its step."""

    class Module(home.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    return Module()


def lightning_trainer(home, folder, callbacks, **options):
    return home.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **{"max_steps": STEPS, "logger": False, "enable_checkpointing": False, **options},
    )


def causal_lm():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(31, (32, 8), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": row, "labels": row.clone()} for row in tokens]


def hf_trainer(folder, **options):
    from transformers import Trainer, TrainingArguments

    model, rows = causal_lm()
    asked = {"max_steps": STEPS, "logging_steps": 3, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
        **asked,
    )
    return Trainer(model, arguments, train_dataset=rows)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_rank(rank, port):
    """What a launcher tells each of two processes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def lightning_rank(rank, port, folder):
    """One of two ranks under DistributedDataParallel; trains with the callback, and without."""
    be_rank(rank, port)
    import pytorch_lightning as home

    from hessdiag.integrations.lightning import SharpnessCallback

    callback, trained = SharpnessCallback(every=EVERY, budget=None), []
    for callbacks in ([callback], []):
        module = lightning_module(home)
        trainer = lightning_trainer(home, folder, callbacks, strategy="ddp", devices=2, num_nodes=1)
        torch.manual_seed(rank)
        trainer.fit(module, DataLoader(data(), batch_size=4, shuffle=True))
        trained.append((trainer.global_step, module.net))
    keep(callback, trained, f"{folder}/{rank}.pt")


def transformers_rank(rank, port, folder):
    """The same under accelerate."""
    be_rank(rank, port)
    from hessdiag.integrations.transformers import SharpnessCallback

    callback, trained = None, []
    for tracked in (True, False):
        trainer = hf_trainer(folder, ddp_backend="gloo")
        if tracked:
            callback = SharpnessCallback(every=EVERY, budget=None, trainer=trainer)
            trainer.add_callback(callback)
        trainer.train()
        trained.append((trainer.state.global_step, trainer.model))
    keep(callback, trained, f"{folder}/{rank}.pt")


def keep(callback, trained, file):
    """What a rank tells the test."""
    (steps, model), (others, alone) = trained
    found = {"steps": (steps, others), "weights": weights(model), "alone": weights(alone)}
    found |= {"tracked": callback.tracker is not None, "tracker": None}
    if callback.tracker is not None:
        found["tracker"] = callback.tracker.state_dict()
    torch.save(found, file)
