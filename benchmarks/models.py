"""The architectures of the checkpoints, written from their descriptions; parameter names match the files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (16, 32, 64)  # channels
BLOCKS = 3  # per stage: 6 * 3 + 2 = 20 layers


def conv3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class PaddedBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.padding = channels_out // 4 if stride != 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class _CifarResNet(nn.Module):
    def __init__(self, block: type[PaddedBlock] | type[ProjectedBlock]) -> None:
        super().__init__()
        self.conv1 = conv3(3, STAGES[0])
        self.bn1 = nn.BatchNorm2d(STAGES[0])
        channels = STAGES[0]
        for stage, width in enumerate(STAGES, start=1):
            blocks = [block(channels, width, 2 if stage > 1 else 1)]
            blocks += [block(width, width, 1) for _ in range(BLOCKS - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            channels = width

    def features(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 64)."""
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, len(STAGES) + 1):
            out = getattr(self, f"layer{stage}")(out)
        return out.mean(dim=(2, 3))


class ResNet20(_CifarResNet):
    """CIFAR ResNet-20 with parameter-free shortcuts: 269,722 parameters (resnet20-12fca82f.th)."""

    def __init__(self) -> None:
        super().__init__(PaddedBlock)
        self.linear = nn.Linear(STAGES[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class PyHessianResNet20(_CifarResNet):
    """CIFAR ResNet-20 with projected shortcuts: 272,474 parameters (pyhessian_resnet20_net.pkl)."""

    def __init__(self) -> None:
        super().__init__(ProjectedBlock)
        self.fc = nn.Linear(STAGES[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class LightningMLP(nn.Module):
    """MNIST MLP 784-64-64-10 with dropout: 55,050 parameters; returns log-probabilities, like its author's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        # cross-entropy of log-probabilities is cross-entropy of the logits: log_softmax is idempotent
        return F.log_softmax(self.model(x), dim=-1)


class DigitsMLP(nn.Sequential):
    """MLP 64-32-10 with ReLU, on 8x8 digits: 2,410 parameters, small enough for its whole Hessian."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Attention(nn.Module):
    """Causal self-attention through torch's own scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(n, length, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Character-level GPT: logits (n, length, vocabulary)."""

    def __init__(self, vocabulary: int = 65, context: int = 64, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))
