"""One model over several processes: PyTorch's FSDP2 for the decoder, slices for embedding and head.

Every process keeps its shard of each weight, as a ``DTensor`` in rows. A decoder layer is gathered
when it runs, and its gradients are summed into the shards (``fully_shard``). Embedding and head,
the two that are as long as the vocabulary, are never gathered (``npo_fast.ops.vocab_parallel``).
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from npo_fast.distributed import is_main_process
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import repeated_layers
from npo_fast.ops.vocab_parallel import VocabularySlice, vocab_parallel_embedding


class VocabularyParallelEmbedding(nn.Module):
    """An embedding of which this process has the rows of one slice of the vocabulary."""

    def __init__(self, embedding: nn.Embedding, vocabulary: VocabularySlice) -> None:
        super().__init__()
        self.weight: Any = embedding.weight  # a DTensor
        self.padding_idx, self.vocabulary = embedding.padding_idx, vocabulary

    def forward(self, ids: Tensor) -> Tensor:  # (…) -> (…, D)
        """Rows of all processes."""
        weight = self.weight.to_local()
        flat = vocab_parallel_embedding(ids.flatten(), weight, self.vocabulary, self.padding_idx)
        return flat.view(*ids.shape, -1)


def shard(lm: CausalLM, mesh: DeviceMesh, attention: str = "auto") -> None:
    """Leaves this process's shard of ``lm`` on its device, in place; chooses the attention anew.

    Raises:
        UserError: a model that cannot be sharded.
    """
    embedding, head = lm.model.get_input_embeddings(), lm.head
    _check(lm, embedding, mesh)
    tied = head.weight is embedding.weight
    embedding.weight = _sharded(embedding.weight, mesh)
    head.weight = embedding.weight if tied else _sharded(head.weight, mesh)
    if head.bias is not None:
        head.bias = _sharded(head.bias, mesh)
    group = mesh.get_group()
    vocabulary = VocabularySlice(group, len(embedding.weight))
    sliced = VocabularyParallelEmbedding(embedding, vocabulary).train(lm.model.training)
    lm.model.set_input_embeddings(sliced)
    ignored = {*sliced.parameters(), *head.parameters()}
    # sums, not means: each process's loss is its part of the loss of the step
    for module in (*repeated_layers(lm.decoder), lm.decoder):
        fully_shard(
            module, mesh=mesh, mp_policy=_policy(module), reshard_after_forward=True,
            ignored_params=ignored,
        )  # fmt: skip
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    lm.vocabulary_slice = VocabularySlice(group, len(head.weight))
    lm.choose_attention(attention)
    _check_packs(lm)


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


def sharded_states(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A gathered state dict of the optimizer, each state sharded as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard_like(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        value = value.to(parameter.dtype)
        return distribute_tensor(value, mesh, placements, src_data_rank=None)

    states = {
        i: {name: shard_like(parameters[i], value) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": states}


def _sharded(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _policy(module: nn.Module) -> MixedPrecisionPolicy:
    """Sums gradients in fp32 where weights are in half precision."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)


def _check_packs(lm: CausalLM) -> None:
    if not lm.packs:
        raise UserError(
            f"{lm.name} takes one sequence at a time with {lm.attention}, and several processes "
            "need packs: use one, or another --attention"
        )


def _check(lm: CausalLM, embedding: nn.Module, mesh: DeviceMesh) -> None:
    world_size = mesh.size()
    if lm.quantized:
        raise UserError("4-bit weights (bitsandbytes) cannot be sharded: use one process")
    _check_packs(lm)
    if type(embedding) is not nn.Embedding or type(lm.head) is not nn.Linear:
        kinds = f"{type(embedding).__name__} and {type(lm.head).__name__}"
        raise UserError(
            f"{lm.name} reads and predicts tokens with {kinds}, not a plain Embedding and Linear: "
            "use one process"
        )
    for rows in (len(embedding.weight), len(lm.head.weight)):
        if (world_size - 1) * -(-rows // world_size) >= rows:
            raise UserError(
                f"a vocabulary of {rows} leaves one of {world_size} processes without a token: "
                "start fewer"
            )
    if lm.decoder.get_input_embeddings() is not embedding:
        warnings.warn(
            f"{lm.name} keeps its embedding outside of the decoder: every process holds all of it",
            stacklevel=3,
        )
