"""Relative flatness (Petzka et al. 2021) and simpler forms: a layer's curvature times the size of its weights.

With rows w_s of one layer's weight and H_{s,s'} the block of the layer's Hessian between two rows,

    κ_tr = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'},        κ_max the same with λ_max(H_{s,s'}).

The layer's inputs are first divided by their standard deviations and the weights multiplied by them, which makes κ
blind to the scale of single neurons before the layer; it is blind to the scale of its own rows anyway. An input
that is constant on the samples (a dead neuron, a border pixel) acts as a bias, and is left out as biases are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hessdiag.engine.products.coordinates import Map
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint, WeightLayer
from hessdiag.gap.measures.curvature import NO_ANALYSIS
from hessdiag.gap.measures.observed import input_spread, passages
from hessdiag.gap.measures.weighted_trace import COST, weighted_trace
from hessdiag.gap.registry import Reading, measure

SOURCE = "Petzka et al. 2021, Definition 3"
RESCALING = ("layer rescaling", "neuron rescaling", "permutation")
MOST_ROWS = 64  # of the last layer: κ_max takes an eigenvalue for every pair of rows
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@measure(
    "relative_flatness",
    title="Relative flatness, penultimate layer",
    family="flatness",
    formula="κ_tr = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}, inputs normalised",
    source=SOURCE,
    invariant=RESCALING,
    cost="1 forward; " + COST,
)
def relative_flatness(checkpoint: Checkpoint) -> Reading | Refused:
    """κ_tr of the penultimate weight layer (the only one, where there is one).

    Without a single block: with WWᵀ = RRᵀ, κ_tr is the trace of the layer's Hessian along W₀ + RΨ, Ψ any matrix.
    Invariant to the scale of layers and neurons of positively homogeneous networks, and to permutations.
    """
    layers = matrices(checkpoint)
    if isinstance(layers, Refused):
        return layers
    layer = layers[-2] if len(layers) > 1 else layers[-1]
    spread = input_spread(checkpoint, layer)
    if isinstance(spread, Refused):
        return spread
    maps = {_weight_name(layer): _tilted(layer, spread)}
    reading = weighted_trace(checkpoint, maps, f"relative flatness {layer.name}")
    return replace(reading, note=f"layer {layer.name}")


@measure(
    "relative_flatness_last",
    title="Relative flatness, last layer",
    family="flatness",
    formula="κ_tr = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}, inputs normalised",
    source=SOURCE,
    invariant=RESCALING,
    cost="1 forward",
)
def relative_flatness_last(checkpoint: Checkpoint) -> Reading | Refused:
    """κ_tr of the layer that gives the logits, exact: H_{s,s'} = E S_{s,s'} x xᵀ with S the loss's own Hessian.

    Invariances as `relative_flatness`. Cost: 1 forward.
    """
    blocks = _last_layer(checkpoint)
    if isinstance(blocks, Refused):
        return blocks
    traces = torch.einsum("nst,nd->st", blocks.curvature, blocks.inputs.square())
    value = float((blocks.gram * traces).sum())
    return Reading(value, value, value, "exact", f"layer {blocks.name}")


@measure(
    "relative_flatness_max",
    title="Relative flatness by eigenvalues, last layer",
    family="flatness",
    formula="κ_max = Σ_{s,s'} ⟨w_s, w_s'⟩ λ_max(H_{s,s'}), inputs normalised",
    source=SOURCE,
    invariant=RESCALING,
    cost="1 forward, an eigenvalue of each pair of rows",
)
def relative_flatness_max(checkpoint: Checkpoint) -> Reading | Refused:
    """κ_max of the layer that gives the logits, exact; at most 64 rows. Invariances as `relative_flatness`."""
    blocks = _last_layer(checkpoint)
    if isinstance(blocks, Refused):
        return blocks
    rows = len(blocks.gram)
    if rows > MOST_ROWS:
        return Refused(f"{rows} outputs: κ_max takes an eigenvalue of each pair of rows, of {MOST_ROWS} at most")
    value, x = 0.0, blocks.inputs
    for s in range(rows):
        pairs = torch.einsum("nt,ni,nj->tij", blocks.curvature[:, s, s:], x, x)
        tops = torch.linalg.eigvalsh(pairs)[:, -1]
        twice = torch.full_like(tops, 2.0)
        twice[0] = 1.0
        value += float((twice * blocks.gram[s, s:] * tops).sum())
    return Reading(value, value, value, "exact", f"layer {blocks.name}")


@measure(
    "simplified_flatness",
    title="Simplified relative flatness, penultimate layer",
    family="flatness",
    formula="‖W_l‖_F² tr H_l",
    source=SOURCE + ", simplified",
    invariant=("layer rescaling", "permutation"),
    cost="none beyond the curvature analysis",
)
def simplified_flatness(checkpoint: Checkpoint) -> Reading | Refused:
    """‖W‖_F² tr H of the penultimate weight layer. Invariant to the scale of layers, not of neurons."""
    layers = matrices(checkpoint)
    if isinstance(layers, Refused):
        return layers
    return _weighed(checkpoint, [layers[-2] if len(layers) > 1 else layers[-1]])


@measure(
    "layerwise_flatness",
    title="Simplified relative flatness, all layers",
    family="flatness",
    formula="Σ_l ‖W_l‖_F² tr H_l",
    source=SOURCE + ", simplified and summed over layers",
    invariant=("layer rescaling", "permutation"),
    cost="none beyond the curvature analysis",
)
def layerwise_flatness(checkpoint: Checkpoint) -> Reading | Refused:
    """‖W‖_F² tr H summed over the weight layers. Invariant to the scale of layers, not of neurons. Cost: none."""
    layers = matrices(checkpoint)
    return layers if isinstance(layers, Refused) else _weighed(checkpoint, layers)


def matrices(checkpoint: Checkpoint) -> list[WeightLayer] | Refused:
    """Linear layers and convolutions whose weights count, in order; or why there are none."""
    names = set(checkpoint.operator.function.names)
    found = [
        layer
        for layer in checkpoint.layers
        if isinstance(layer.module, (nn.Linear, *CONVOLUTIONS)) and _weight_name(layer) in names
    ]
    return found or Refused("no linear layer or convolution has a weight that counts")


def _weight_name(layer: WeightLayer) -> str:
    return f"{layer.name}.weight" if layer.name else "weight"


def _weighed(checkpoint: Checkpoint, layers: list[WeightLayer]) -> Reading | Refused:
    if checkpoint.analysis is None:
        return NO_ANALYSIS
    traces = {layer.name: layer for layer in checkpoint.analysis.layers}
    if any(_weight_name(layer) not in traces for layer in layers):
        return Refused("the curvature analysis was made without traces per layer")
    pairs = [(float(layer.weight.double().square().sum()), traces[_weight_name(layer)]) for layer in layers]
    exact = all(trace.kind == "exact" for _, trace in pairs)
    value, lo, hi = (sum(size * getattr(trace, end) for size, trace in pairs) for end in ("trace", "lo", "hi"))
    # ends added as they are: the layers' errors come from the same probes, and none may be called independent
    return Reading(value, lo, hi, "exact" if exact else "draws")


def _tilted(layer: WeightLayer, spread: Tensor) -> Map:
    """Ψ to R Ψ Σ⁻¹ with RRᵀ = W Σ² Wᵀ, Σ the standard deviations of the inputs behind each column of W."""
    W = layer.weight.double().flatten(1)
    if isinstance(layer.module, CONVOLUTIONS):
        # rows of different groups see different channels: their columns have no common scale
        grouped = layer.module.groups > 1
        columns = torch.ones(W.shape[1]) if grouped else spread.repeat_interleave(W.shape[1] // len(spread))
    else:
        columns = spread
    columns = columns.to(W)
    values, vectors = torch.linalg.eigh((W * columns.square()) @ W.T)
    root = (vectors * values.clamp(min=0).sqrt()).to(layer.weight)
    inverse = torch.where(columns > 0, 1 / columns, 0.0).to(layer.weight)

    def tilt(moves: Tensor) -> Tensor:
        tilted: Tensor = root @ moves.flatten(1) * inverse
        return tilted.view_as(moves)

    return tilt


@dataclass(frozen=True)
class _LastLayer:
    """Normalised inputs (n, d), the loss's Hessian by the logits (n, C, C) over the weight, and ŴŴᵀ (C, C)."""

    name: str
    inputs: Tensor
    curvature: Tensor
    gram: Tensor


def _last_layer(checkpoint: Checkpoint) -> _LastLayer | Refused:
    layers = matrices(checkpoint)
    if isinstance(layers, Refused):
        return layers
    layer = layers[-1]
    if not isinstance(layer.module, nn.Linear):
        return Refused(f"the last layer {layer.name} is no linear layer: its blocks have no closed form here")
    inputs, curvatures = [], []
    for outputs, calls in passages(checkpoint, layer.module):
        if len(calls) != 1 or not _are_logits(checkpoint, calls[0].output, outputs):
            return Refused(f"the model's outputs are not those of its last layer {layer.name}")
        S = _by_logits(checkpoint, calls[0].output, checkpoint.operator.batches[calls[0].batch])
        if isinstance(S, Refused):
            return S
        inputs.append(calls[0].input.double().reshape(-1, calls[0].input.shape[-1]).cpu())
        curvatures.append(S.cpu())
    spread = input_spread(checkpoint, layer)
    if isinstance(spread, Refused):
        return spread
    spread = spread.cpu()
    weight = layer.weight.detach().double().cpu() * spread
    S = torch.cat(curvatures) / checkpoint.operator.total_weight
    inverse = torch.where(spread > 0, 1 / spread, 0.0)
    return _LastLayer(layer.name, torch.cat(inputs) * inverse, S, weight @ weight.T)


def _are_logits(checkpoint: Checkpoint, given: Tensor, outputs: Tensor) -> bool:
    """Whether the model returns what the layer gives, or, to cross-entropy the same, its log-softmax."""
    if given.shape != outputs.shape or torch.equal(given, outputs):
        return given.shape == outputs.shape
    again = given.double().log_softmax(-1).to(outputs)
    known = checkpoint.problem.built_in
    return known is not None and known.of_classes and torch.allclose(again, outputs, rtol=1e-5, atol=1e-6)


def _by_logits(checkpoint: Checkpoint, outputs: Tensor, batch: object) -> Tensor | Refused:
    """The Hessian of every row's loss by its outputs, (rows, C, C) float64."""
    problem, known = checkpoint.problem, checkpoint.problem.built_in
    if problem.weight is not None or known is None:
        return Refused(
            "the loss is not one of the built-in criteria: its Hessian by the outputs is not known here"
        )
    width, targets = outputs.shape[-1], problem.targets(batch)
    if not known.of_classes:
        return torch.diag_embed(known.bends(outputs, targets).reshape(-1, width))
    logits, targets = known.align(outputs, targets)
    second = targets.is_floating_point() and outputs.dim() > 2  # soft targets: classes second, as in torch
    if second or logits.shape[1] != width or len(logits) * width != outputs.numel():
        return Refused("the classes are not the last layer's outputs")
    p = logits.double().softmax(-1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) * known.sizes(targets)[:, None, None]
