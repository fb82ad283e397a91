"""Adapter files of PEFT: a few tensors beside a base model, under names without the adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

KINDS = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_lambda_", "prompt_embeddings", "randlora_")
"""How the components of such names begin."""
SAVED = "modules_to_save"  # whole modules, trained beside the adapter
MAGNITUDE = "lora_magnitude_vector"  # of DoRA; in files without the name of its one parameter
ADVICE = (
    "it is an adapter of PEFT, without the base weights: wrap the model in your factory with "
    "peft.get_peft_model(base, config), its base weights loaded, and give the adapter with -c"
)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file with these names is an adapter alone: with some of its tensors, and without a base layer."""
    parts = [name.split(".") for name in names]
    return any(part.startswith(KINDS) for name in parts for part in name) and not any(
        "base_layer" in name for name in parts
    )


def onto_adapter(
    model: nn.Module, target: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str] | None:
    """The tensors of an adapter file under the model's own names, where it has all of one adapter's.

    Returns:
        The tensors and a note; None if the file is no adapter, or not one of this model.
    """
    for adapter in _adapters(model):
        wanted = {_bare(name, adapter): name for name in target if adapter in name.split(".")}
        if wanted and wanted.keys() == state.keys():
            rest = len(target) - len(wanted)
            note = f"an adapter: {len(wanted)} tensors loaded into {adapter!r}; the other {rest} stay as they are"
            return {wanted[name]: tensor for name, tensor in state.items()}, note
    return None


def _adapters(model: nn.Module) -> list[str]:
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    return list(dict.fromkeys(str(name) for config in configs if isinstance(config, Mapping) for name in config))


def _bare(name: str, adapter: str) -> str:
    """lora_A.default.weight -> lora_A.weight; head.modules_to_save.default.weight -> head.weight."""
    parts = name.split(".")
    at = parts.index(adapter)
    if parts[at - 1] == MAGNITUDE:
        return ".".join(parts[:at])
    return ".".join(parts[: at - 1 if parts[at - 1] == SAVED else at] + parts[at + 1 :])
