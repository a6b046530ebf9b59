"""One model over several processes: PyTorch's FSDP2 for the decoder, slices for embedding and head.

Every process keeps its shard of each weight, as a ``DTensor`` in rows. A decoder layer is gathered
when it runs, and its gradients are summed into the shards (``fully_shard``). Embedding and head,
the two that are as long as the vocabulary, are never gathered (``npo_fast.ops.vocab_parallel``).
"""

import re
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter

from npo_fast.distributed import is_main_process, local_of, rows_of
from npo_fast.errors import UserError
from npo_fast.model.attention import class_name
from npo_fast.model.causal_lm import decoder_of
from npo_fast.model.layers import repeated_layers
from npo_fast.model.weights import load_complete
from npo_fast.ops.vocab_parallel import (
    VocabularySlice,
    vocab_parallel_embedding,
    vocab_parallel_logits,
)


class VocabularyParallelEmbedding(nn.Module):
    """An embedding of which this process has the rows of one slice of the vocabulary."""

    def __init__(self, embedding: nn.Embedding, vocabulary: VocabularySlice) -> None:
        super().__init__()
        self.weight: Any = embedding.weight  # a DTensor
        self.padding_idx, self.vocabulary = embedding.padding_idx, vocabulary
        scaled: Any = None
        if type(embedding) is not nn.Embedding:  # such as Gemma's, which scales its rows
            scaled = copy(embedding)
            scaled._parameters = {"weight": nn.Parameter(torch.empty(0))}
            scaled.padding_idx = None
        self.__dict__["scaled"] = scaled  # not a submodule

    def forward(self, ids: Tensor) -> Tensor:  # (…) -> (…, D)
        """Rows of all processes."""
        weight = self.weight.to_local()
        rows = vocab_parallel_embedding(ids.flatten(), weight, self.vocabulary, self.padding_idx)
        scaled: Any = self.__dict__["scaled"]
        if scaled is None:
            return rows.view(*ids.shape, -1)
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        embedded: Tensor = functional_call(scaled, {"weight": rows}, (places,))
        return embedded


class VocabularyParallelHead(nn.Module):
    """A linear head of which this process has the rows of one slice of the vocabulary.

    The losses read its weight and bias. Its forward is for generation, and all processes call it.
    """

    def __init__(self, head: nn.Linear, vocabulary: VocabularySlice) -> None:
        super().__init__()
        self.weight: Any = head.weight  # a DTensor
        self.bias: Any = head.bias
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor) -> Tensor:  # (…, D) -> (…, V)
        """Whole logits, without a gradient."""
        if not isinstance(self.weight, DTensor):  # exchanged for a whole one
            return nn.functional.linear(hidden, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to_local()
        weight, flat = self.weight.to_local(), hidden.detach().flatten(0, -2)
        logits = vocab_parallel_logits(flat, weight, bias, self.vocabulary)
        return logits.view(*hidden.shape[:-1], -1)


def load_shards(
    model_class: Any, name: str, mesh: DeviceMesh, device: torch.device, **arguments: Any
) -> Any:
    """``load_complete`` of this process's share: rows of every parameter, as ``DTensor``.

    transformers reads no more than these rows of safetensors files, but for weights that it makes
    from rows of others (``_needs_whole``): of these, one at a time is whole. Buffers are whole.
    """
    modules: set[nn.Module] = set()

    def build(self: Any, *of_model: Any, **options: Any) -> None:
        model_class.__init__(self, *of_model, **options)
        modules.update(self.modules())
        _distribute(self, mesh, _needs_whole(self, mesh.size()))

    def keep_rows(module: nn.Module, _: str, parameter: Any) -> nn.Parameter | None:
        if module not in modules or parameter is None or parameter.is_meta:
            return None
        rows = _sharded(parameter, mesh)
        rows._is_hf_initialized = getattr(parameter, "_is_hf_initialized", False)  # type: ignore[attr-defined]
        return rows

    # by this name and module, transformers knows how the files of a class are read
    own = {"__init__": build, "__module__": model_class.__module__}
    distributed = type(model_class.__name__, (model_class,), own)
    registered = register_module_parameter_registration_hook(keep_rows)  # type: ignore[arg-type]
    try:
        model = load_complete(distributed, name, device_map={"": device}, **arguments)
    finally:
        registered.remove()
    model.__class__ = model_class
    return model


@torch.no_grad()
def read_shards(model: Any, weights: Mapping[str, Any]) -> list[str]:
    """Reads this process's rows of ``weights`` into the parameters of the same names, in place.

    Args:
        weights: tensors, or slices of safetensors files.

    Returns:
        Names of the parameters that it lacks.
    """
    names: dict[Tensor, list[str]] = {}  # tied ones lie there under one of theirs
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    missing = []
    for parameter, known in names.items():
        found = next((name for name in known if name in weights), None)
        if found is None:
            missing.append(known[0])
            continue
        rows: Any = slice(None)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            first, count = rows_of(len(parameter), mesh.get_local_rank(), mesh.size())
            rows = slice(first, first + count)
        local = local_of(parameter)
        if local.numel():
            local.copy_(weights[found][rows])
    return missing


def shard(model: Any, mesh: DeviceMesh, offload: bool = False) -> Any:
    """Leaves this process's shard of a transformers model, or of its adapter, in place.

    Args:
        model: whole, or from ``load_shards``.
        offload: keeps the decoder's shards, their gradients and optimizer states in CPU memory
            (FSDP2's ``CPUOffloadPolicy``); those of embedding and head stay on the device.

    Raises:
        UserError: a model that cannot be sharded.
    """
    decoder = decoder_of(model, model.get_output_embeddings())
    head = slice_vocabulary(model, mesh.get_group(), lambda parameter: _sharded(parameter, mesh))
    ignored = {*model.get_input_embeddings().parameters(), *head.parameters()}
    shards: dict[str, Any] = {
        name: _sharded(p, mesh)
        for name, p in decoder.named_parameters()
        # FSDP2 of PyTorch 2.9 divides no codes of 4-bit weights, but gathers them
        if p not in ignored and (isinstance(p, DTensor) or not p.is_floating_point())
    }
    for name, parameter in shards.items():  # FSDP2 shards whole parameters, be they empty
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        whole = torch.empty(parameter.shape, dtype=dtype, device="meta")
        _set_parameter(decoder, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    # sums, not means: each process's loss is its part of the loss of the step
    for module in (*repeated_layers(decoder), decoder):
        fully_shard(
            module, mesh=mesh, mp_policy=_policy(module), reshard_after_forward=True,
            ignored_params=ignored, offload_policy=policy,
        )  # fmt: skip
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name, parameter in shards.items():
        if offload:
            parameter = nn.Parameter(
                parameter.detach().cpu(), requires_grad=parameter.requires_grad
            )
        _set_parameter(decoder, name, parameter)
    return model


def slice_vocabulary(
    model: Any, group: dist.ProcessGroup, rows: Callable[[nn.Parameter], nn.Parameter]
) -> VocabularyParallelHead:
    """Leaves one process's rows of embedding and head in their places; returns that head.

    Args:
        rows: this process's of a parameter, with ``to_local``.

    Raises:
        UserError: an embedding or a head that cannot be sliced.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _check(model, embedding, head, group.size())
    words, predicted = (VocabularySlice(group, len(each.weight)) for each in (embedding, head))
    tied = head.weight is embedding.weight
    embedding.weight = rows(embedding.weight)
    head.weight = embedding.weight if tied else rows(head.weight)
    if head.bias is not None:
        head.bias = rows(head.bias)
    sliced = VocabularyParallelHead(head, predicted).train(head.training)
    own_words = VocabularyParallelEmbedding(embedding, words)
    model.set_input_embeddings(own_words.train(embedding.training))
    model.set_output_embeddings(sliced)
    return sliced


def gather_state_dict(state: Any) -> Any:
    """A state dict with full tensors, on the CPU of the main process; empty ones on the others.

    Every process has to call it where something is sharded.
    """
    gathered: dict[int, Tensor] = {}  # by id: tied weights stay one tensor

    def gather(value: DTensor) -> Tensor:
        if id(value) not in gathered:
            full = value.full_tensor().detach()
            full = full.cpu() if is_main_process() else full.new_empty(0, device="cpu")
            gathered[id(value)] = full
        return gathered[id(value)]

    return tree_map_only(DTensor, gather, state)


def _sharded(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        return parameter
    whole = parameter.detach().contiguous()
    first, count = rows_of(len(whole), mesh.get_local_rank(), mesh.size())
    rows = DTensor.from_local(
        whole[first : first + count].clone(),  # distribute_tensor of PyTorch 2.9 keeps the whole
        mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _distribute(model: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Makes each parameter but ``whole`` a ``DTensor`` in rows; tied ones stay one."""
    distributed = {parameter: parameter for parameter in whole}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in distributed:
                distributed[parameter] = _sharded(parameter, mesh)
            setattr(module, name, distributed[parameter])


def _needs_whole(model: Any, world_size: int) -> set[nn.Parameter]:
    """Parameters whose rows transformers cannot make from the same rows of the files.

    It stacks experts, a matrix each, and joins or cuts columns; an operation along rows needs all
    of them. A process without an expert would have nothing to stack.
    """
    whole = set()
    for conversion in get_model_conversion_mapping(model):
        if not isinstance(conversion, WeightConverter):
            continue
        stacks = any(isinstance(each, MergeModulelist) for each in conversion.operations)
        by_row = all(_keeps_rows(operation) for operation in conversion.operations)
        patterns = [re.sub(r"\\\d|\*", ".*", p).strip("^$") for p in conversion.target_patterns]
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in patterns):
                _, last = rows_of(len(parameter), world_size - 1, world_size)
                if not by_row or (stacks and last == 0):
                    whole.add(parameter)
    return whole


def _keeps_rows(operation: Any) -> bool:
    """Whether row n of the result of a conversion is made from row n, or from matrix n, alone."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    return isinstance(operation, (Chunk, Concatenate)) and operation.dim > 0


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, parameter)


def _policy(module: nn.Module) -> MixedPrecisionPolicy:
    """Sums gradients in fp32 where weights are in half precision."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)


def _check(model: Any, embedding: Any, head: Any, world_size: int) -> None:
    name = class_name(model)
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        raise UserError(
            f"{name} reads and predicts tokens with {kinds}, not an Embedding and a plain Linear: "
            "use one process"
        )
    for rows in (len(embedding.weight), len(head.weight)):
        if (world_size - 1) * -(-rows // world_size) >= rows:
            raise UserError(
                f"a vocabulary of {rows} leaves one of {world_size} processes without a token: "
                "start fewer"
            )
    if decoder_of(model, head).get_input_embeddings() is not embedding:
        warnings.warn(
            f"{name} keeps its embedding outside of the decoder: every process holds all of it",
            stacklevel=3,
        )
