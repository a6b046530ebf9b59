"""The model of a run: by name, from a folder, or an object in memory."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch.distributed.device_mesh import DeviceMesh

from npo_fast.data import Rendering, Template
from npo_fast.distributed import init_process_group, local_device, world_size
from npo_fast.errors import UserError
from npo_fast.model.adapters import add_lora
from npo_fast.model.attention import set_attention
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import eos_ids
from npo_fast.model.load import (
    DTYPES,
    default_dtype,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    quantized_adapter_rank,
    stored_dtype,
    usable_device,
)
from npo_fast.model.model_files import largest_shard
from npo_fast.model.sharding import VocabularyParallelHead, shard
from npo_fast.runs.options import ModelOptions
from npo_fast.runs.output import metadata_of_model
from npo_fast.runs.resume import ResumableRun
from npo_fast.runs.run import Run
from npo_fast.runs.threads import fit_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Model = Union[str, Path, Run, "PreTrainedModel", CausalLM]


class ModelSource:
    """Tokenizer and weights of a model, each loaded when it is asked for.

    Args:
        model: hub name, folder, GGUF file, run, transformers model or ``CausalLM``; a model in
            memory is trained in place.
        tokenizer: of a model in memory; else that of its ``name_or_path``.
        role: the argument's name in messages.
    """

    def __init__(
        self, model: Model, options: ModelOptions, tokenizer: Any = None, role: str = "model"
    ) -> None:
        self.in_memory: Any = None
        self.metadata: Mapping[str, Any] = {}  # run.json of the run that made the model
        if isinstance(model, (str, Path, Run)):
            name = self.name = str(model.folder if isinstance(model, Run) else model)
            if not name:
                raise UserError(
                    f"say which model with --{role} (a hub name, a folder, a GGUF file)"
                )
            self.metadata = metadata_of_model(Path(name))
        else:
            self.in_memory = model
            network = model.model if isinstance(model, CausalLM) else model
            if not hasattr(network, "get_output_embeddings"):
                raise UserError(
                    f"{role} must be a name, a folder, a run or a causal language model, "
                    f"got {model!r}"
                )
            # by this name the tokenizer is found, and the base of an adapter
            self.name = getattr(network, "name_or_path", "") or type(network).__name__
            name = f"{self.name} (in memory)"
        self.options = replace(options, model=name)
        self.rendering = _as_trained(options.rendering(), self.metadata.get("rendering", {}))
        self._tokenizer = tokenizer

    def template(self, now: datetime | None = None) -> Template:
        """The template that turns records into tokens, with the model's tokenizer.

        Args:
            now: the date of a template that prints one; else that of the run that made the model,
                else today.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name)
        rendering = replace(self.rendering, now=now or self.rendering.now or datetime.now())
        config = getattr(self._network, "generation_config", None)
        config = config or load_generation_config(self.name)
        return Template(
            self._tokenizer, max_length=self.options.max_length, rendering=rendering,
            stop_ids=eos_ids(config),
        )  # fmt: skip

    @contextmanager
    def loaded(
        self, resumable: ResumableRun | None = None, offload: bool = False
    ) -> Iterator[CausalLM]:
        """The model of ``load``; afterwards it has its own attention and evaluation mode again.

        A ``CausalLM`` that was passed stays as it is.
        """
        lm = self.load(resumable, offload)
        try:
            yield lm
        finally:
            if not isinstance(self.in_memory, CausalLM):
                set_attention(lm.model, lm.native_attention)
                lm.model.eval()

    def load(self, resumable: ResumableRun | None = None, offload: bool = False) -> CausalLM:
        """The model before training; several processes shard it.

        Args:
            resumable: the run that goes on.
            offload: as in ``npo_fast.model.sharding.shard``.
        """
        options = self.options
        if self.in_memory is not None:
            lm = self._wrap(offload)
        else:
            logger.info(f"loading {options.model}")
            lm = self._load(offload)
        trained = ""
        if options.lora_rank:
            count = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
            trained = f" ({count / 1e6:.2f}M of them to train)"
        width = "4 bit" if lm.quantized else str(lm.dtype).removeprefix("torch.")
        processes = f" in {world_size()} processes" if world_size() > 1 else ""
        logger.info(
            f"{lm.name}, {lm.model.num_parameters() / 1e6:.1f}M parameters{trained}, {width} on "
            f"{lm.device}{processes}, attention {lm.attention}"
        )
        earlier = None if resumable is None else resumable.metadata.get("threads")
        fit_threads(lm.model.num_parameters(), lm.device, earlier)
        return lm

    def device(self) -> torch.device:
        """Where the model will be, tried with a tensor; ``UserError`` where it cannot be."""
        if self.in_memory is not None:
            return self.in_memory.device
        if world_size() > 1:
            return usable_device(str(local_device(self.options.device)), self.options.device)
        return usable_device(self.options.device)

    def without_weights(self) -> CausalLM:
        """The model of ``load`` on the meta device: its classes, shapes and configurations."""
        from npo_fast.planner.model import empty_lm, empty_model

        options, name = self.options, self.name
        if self.in_memory is not None:
            config, generation = self._network.config, self._network.generation_config
            names = (name for name, each in DTYPES.items() if each == self._network.dtype)
            dtype = next(names, "fp32")
        else:
            config, generation = load_config(name), load_generation_config(name)
            dtype = default_dtype(self.device()) if options.dtype == "auto" else options.dtype
        rank, quantize = options.lora_rank, options.quantize
        if self.in_memory is None and (kept := quantized_adapter_rank(name)):
            rank, quantize = kept, "4bit"
        lm = empty_lm(empty_model(config, dtype, rank, quantize), False)
        if generation is not None and not lm.adapted:
            lm.model.generation_config = generation
        if self.in_memory is None and options.dtype == "auto" and options.quantize == "none":
            lm.saved_dtype = stored_dtype(name)
        lm.max_shard_bytes = largest_shard(name)
        return lm

    def meet(self) -> DeviceMesh | None:
        """Meets the other processes that share the model, if there are any."""
        return init_process_group(local_device(self.options.device)) if world_size() > 1 else None

    @property
    def _network(self) -> Any:
        """The transformers model in memory, if there is one."""
        return self.in_memory.model if isinstance(self.in_memory, CausalLM) else self.in_memory

    def _load(self, offload: bool) -> CausalLM:
        names = ("dtype", "device", "attention", "quantize", "lora_rank", "lora_alpha")
        arguments = {name: getattr(self.options, name) for name in names}
        if world_size() == 1:
            return load_model(self.options.model, **arguments)
        device, mesh = local_device(self.options.device), self.meet()
        return load_model(
            self.options.model,
            **{**arguments, "device": str(device)}, mesh=mesh, offload=offload,
        )  # fmt: skip

    def _wrap(self, offload: bool) -> CausalLM:
        """A model in memory, with a new adapter where the options ask for one.

        Several processes each have it whole, and keep their share.
        """
        options, model, mesh = self.options, self.in_memory, self.meet()
        if options.quantize != "none":
            raise UserError('quantize="4bit" loads weights by name: pass the name of the model')
        if isinstance(model, CausalLM):
            if not options.lora_rank and model.world_size == world_size():
                return model
            model = model.model
        is_divided = isinstance(model.get_output_embeddings(), VocabularyParallelHead)
        if is_divided and options.lora_rank:
            raise UserError(
                f"{self.name} is divided among processes, and takes no adapter: load it again"
            )
        if mesh is not None and model.device.type != mesh.device_type:
            raise UserError(
                f"{self.name} is on {model.device}, and the processes share it on "
                f"{mesh.device_type}: move it there first, or pass device={model.device.type!r}"
            )
        if options.lora_rank:
            model = add_lora(model, self.name, options.lora_rank, options.lora_alpha)
        if mesh is not None and not is_divided:
            model = shard(model, mesh, offload)
        return CausalLM(model, options.attention)


def name_of(model: Model) -> str:
    """A model as ``run.json`` names it: by name or folder; one in memory by its class."""
    if isinstance(model, Run):
        return str(model.folder)
    return str(model) if isinstance(model, (str, Path)) else f"{type(model).__name__} (in memory)"


def _as_trained(given: Rendering, run: Mapping[str, Any]) -> Rendering:
    """What is given, and for the rest the rendering of ``run``, the ``run.json`` of the model."""
    if not run:
        return given
    now = run.get("now")
    as_run = Rendering(
        run["template"], run.get("chat_template"), run.get("system_prompt"),
        run.get("template_kwargs") or {}, datetime.fromisoformat(now) if now else None,
    )  # fmt: skip
    if given.template != "auto":
        as_run = Rendering(
            given.template, given.chat_template, as_run.system_prompt,
            as_run.template_kwargs if given.template == run["template"] else {}, as_run.now,
        )  # fmt: skip
    if given.system_prompt is not None:
        as_run = replace(as_run, system_prompt=given.system_prompt)
    return replace(as_run, template_kwargs={**as_run.template_kwargs, **given.template_kwargs})
