"""BatchNorm in evaluation mode is a fixed scale and shift: folded into the layer before it."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from hessdiag.criteria import target_of
from hessdiag.errors import ProblemError, Refused
from hessdiag.gap.checkpoint import Checkpoint, WeightLayer
from hessdiag.gap.measures.observed import same_tensor_pairs
from hessdiag.samples import divide, map_tensors

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LINKS = (nn.LogSoftmax, nn.Softmax)  # as a model's last module they belong to its loss: paths end before them
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def norm_after(checkpoint: Checkpoint) -> dict[str, WeightLayer]:
    """Name of a linear layer or convolution to the BatchNorm that is given its output as it is.

    One forward of a batch, where there is BatchNorm.
    """
    pairs = [
        (one, two)
        for one, two in itertools.pairwise(checkpoint.layers)
        if one.kind in ("linear", "conv") and _has_statistics(two.module)
    ]
    if not pairs:
        return {}
    found = {id(one) for one, _ in same_tensor_pairs(checkpoint, [(one.module, two.module) for one, two in pairs])}
    return {one.name: two for one, two in pairs if id(one.module) in found}


def folded_matrices(checkpoint: Checkpoint) -> list[Tensor] | Refused:
    """Weights of linear layers, convolutions and embeddings as matrices (out, rest), float64, BatchNorm folded.

    A BatchNorm without such a layer before it is a diagonal matrix. Other normalisations are left out: they are
    blind to the scale of what comes in.
    """
    after, matrices, folded = norm_after(checkpoint), [], set()
    for layer in checkpoint.layers:
        if layer.kind == "norm":
            continue
        weight = layer.weight.double()
        matrix = (weight.transpose(0, 1) if isinstance(layer.module, TRANSPOSED) else weight).flatten(1)
        norm = after.get(layer.name)
        if norm is not None:
            folded.add(norm.name)
            matrix = matrix * norm_scale(norm.module).to(matrix)[:, None]
        matrices.append(matrix)
    alone = [x for x in checkpoint.layers if _has_statistics(x.module) and x.name not in folded]
    matrices += [torch.diag(norm_scale(layer.module).cpu()) for layer in alone]
    return matrices or Refused("the model has no linear layer, convolution or embedding")


def norm_scale(norm: nn.Module) -> Tensor:
    """γ/√(σ² + ε) of a BatchNorm, (channels,) float64."""
    if not isinstance(norm, BATCH_NORMS) or norm.running_var is None:
        return torch.ones(0, dtype=torch.float64)
    variance = norm.running_var.detach().double()
    gamma = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().double()
    return gamma / (variance + norm.eps).sqrt()


def path_outputs(checkpoint: Checkpoint, scale: float) -> Tensor | None:
    """Outputs of the network with every weight squared, BatchNorm folded, on an example of all ``scale``; float64.

    A softmax or log-softmax that ends the model is left out: it is the loss's. None where the batch holds no
    floating-point input. One forward pass of one example, on a copy of the model.
    """
    problem = checkpoint.problem
    batch = next(divide(checkpoint.operator.batches[0], 1))
    floating = map_tensors(batch, lambda leaf: leaf if leaf.is_floating_point() else None)
    inputs = [leaf for leaf in _tensors(floating) if leaf is not _target(batch)]
    if not inputs:
        return None
    ones = map_tensors(
        batch,
        lambda leaf: torch.full_like(leaf, scale, dtype=torch.float64) if leaf.is_floating_point() else leaf,
    )
    with torch.no_grad():
        model = copy.deepcopy(problem.bare_model()).to(ones_device(ones)).double().eval()
        square_weights(model, checkpoint)
        linked = _linked(model)
        outputs = problem.outputs(model, ones)
    outputs = next((given for given, made in reversed(linked) if made is outputs), outputs)
    if not isinstance(outputs, Tensor):
        msg = f"the model returns {type(outputs).__name__}"
        raise TypeError(msg)
    return outputs.double()


def _linked(model: nn.Module) -> list[tuple[Tensor, object]]:
    """Filled with what goes into each softmax module of a copy, and what it makes of that."""
    seen: list[tuple[Tensor, object]] = []
    for module in model.modules():
        if isinstance(module, LINKS):
            module.register_forward_hook(lambda _, given, made: seen.extend((one, made) for one in given[:1]))
    return seen


def square_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Square every parameter of a copy in place; each BatchNorm becomes its own scale and shift, squared."""
    modules = dict(model.named_modules())
    shifts = {norm.name: modules[name] for name, norm in norm_after(checkpoint).items()}
    with torch.no_grad():
        plans = []
        for name, module in modules.items():
            if not _has_statistics(module):
                continue
            scale = norm_scale(module)
            mean = module.running_mean.detach().double()
            before = getattr(shifts.get(name), "bias", None)
            # the bias before it belongs to the same folded bias, and is taken out of its own layer
            inside = mean if before is None else mean - before.detach().double()
            shift = -inside * scale
            if module.bias is not None:
                shift = shift + module.bias.detach().double()
            if before is not None:
                before.zero_()
            plans.append((module, scale.square(), shift.square()))
        for parameter in model.parameters():
            parameter.square_()
        for module, scale, shift in plans:
            module.weight, module.bias = nn.Parameter(scale), nn.Parameter(shift)
            module.affine = True
            module.running_mean = torch.zeros_like(scale)
            module.running_var, module.eps = torch.ones_like(scale), 0.0


def ones_device(batch: object) -> torch.device:
    """Where the batch's tensors are."""
    return next(iter(_tensors(batch))).device


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and module.running_var is not None


def _tensors(batch: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, lambda leaf: found.append(leaf))
    return found


def _target(batch: object) -> Tensor | None:
    try:
        return target_of(batch)
    except ProblemError:
        return None
