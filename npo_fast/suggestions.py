"""The option that is meant where a name is unknown: a typing error, or another library's name.

Names are those of options without dashes, in Python's spelling: ``batch_size``.
"""

import difflib
import re
from collections.abc import Collection, Iterable

# What people type who know transformers, TRL, peft or open-unlearning, and what to type here. Where
# there are several, the first that a command has is meant. Options are written as flags.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    name: tuple(meant.split(" | "))
    for names, meant in {
        # training
        "learning_rate lr_rate peak_lr max_lr": "--lr",
        "num_epochs n_epochs num_train_epochs max_epochs": "--epochs",
        "per_device_train_batch_size train_batch_size per_device_batch_size bs batch":
            "--batch-size",
        "per_device_eval_batch_size eval_batch_size generation_batch_size":
            "--generation-batch",
        "gradient_accumulation_steps micro_batch_size micro_batch": "--micro-batch-tokens",
        "lr_scheduler_type lr_scheduler scheduler": "--lr-schedule",
        "warmup warmup_ratio warmup_epochs num_warmup_steps": "--warmup-steps",
        "wd decay": "--weight-decay",
        "optim opt": "--optimizer",
        "grad_clip clip_grad clip gradient_clipping max_norm": "--max-grad-norm",
        "activation_checkpointing grad_checkpointing use_gradient_checkpointing":
            "--gradient-checkpointing",
        "random_seed data_seed": "--seed",
        "cpu_offload offload": "--offload-optimizer",
        "sam rho sam_rho": "--sharpness-rho",
        # model
        "model_name_or_path pretrained_model_name_or_path model_name model_path model_id "
        "pretrained checkpoint base": "--model",
        "ref_model ref_model_path reference_model oracle": "--reference",
        "chat_template prompt_template": "--template",
        "system system_message": "--system-prompt",
        "max_seq_length max_seq_len model_max_length seq_len cutoff_len max_tokens": "--max-length",
        "generation_max_length max_generated_tokens": "--max-new-tokens",
        "torch_dtype precision mixed_precision": "--dtype",
        "bf16": "--dtype bf16",
        "fp16 half": "--dtype fp16",
        "fp32": "--dtype fp32",
        "load_in_4bit use_4bit qlora load_in_8bit": "--quantize 4bit",
        "cpu use_cpu no_cuda": "--device cpu",
        "cuda gpu": "--device cuda",
        "attn_implementation attn flash_attention use_flash_attention_2": "--attention",
        "lora_r r lora_dim": "--lora-rank",
        "lora use_lora peft use_peft": "--lora-rank 16",
        "merge_lora merge_adapter merge_and_unload": "--merge",
        # data
        "forget_set forget_data forget_file forget_path forget_split forget_dataset": "--forget",
        "retain_set retain_data retain_file retain_path retain_split retain_dataset": "--retain",
        "holdout_set holdout_data holdout_file holdout_split holdout_dataset": "--holdout",
        "train_set train_file train_data train_dataset train_split training_data": "--train",
        "dataset dataset_name dataset_path data_path data_dir data_files":
            "--data | --train",
        "retain_logs_path retain_log retrained_log retrain": "--retrained",
        # method
        "trainer loss loss_type algorithm algo objective unlearn_method": "--method",
        "forget_coeff forget_weight npo_coeff": "--forget-coefficient",
        "alpha retain_coeff retain_weight grad_diff_coeff": "--retain-coefficient",
        "kl_coeff kl_weight": "--kl-coefficient",
        "beta_auto auto_beta": "--beta auto",
        "steering_coeff": "--steering",
        "eps": "--epsilon",
        # the run
        "output_dir out out_dir output_path output_folder save_dir save_path log_dir logging_dir":
            "--output",
        "overwrite_output_dir force": "--overwrite",
        "save_steps save_interval checkpoint_every checkpointing_steps save_freq": "--save-every",
        "eval_steps eval_interval eval_freq eval_strategy evaluation_strategy": "--eval-every",
        "metric_for_best_model load_best_model_at_end": "--keep-best",
        "report_to logger tracker": "--track",
        "wandb use_wandb": "--track wandb",
        "tensorboard": "--track tensorboard",
        "hub_model_id push hub_repo": "--push-to-hub",
        "config_file config_path settings yaml": "--config",
        "dry check": "--dry-run",
        "resume resume_from_checkpoint":
            "the same command goes on with the unfinished run in --output",
        # measuring
        "tasks eval_tasks benchmarks": "--lm-eval",
        "gpus num_gpus n_gpu nproc nproc_per_node world_size": "--ranks",
        "gpu_memory vram memory": "--card",
        "top_k num_samples n_samples": "--report-records | --answers",
    }.items()
    for name in names.split()
}  # fmt: skip
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """What to type in the place of ``name``: a flag such as "--lr", or a short sentence.

    Args:
        name: as it was typed, with dashes or without.
        known: the options that there are.
    """
    known = set(known)
    name = normal(name)
    if name in ELSEWHERE and (meant := _first_known(ELSEWHERE[name], known)):
        return meant
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return flag_of(near[0])
    for other in difflib.get_close_matches(name, ELSEWHERE, n=3, cutoff=0.85):
        if meant := _first_known(ELSEWHERE[other], known):
            return meant
    near = difflib.get_close_matches(name, known, n=1)
    return flag_of(near[0]) if near else None


def normal(name: str) -> str:
    """An option's name as ``ELSEWHERE`` has it; of a dotted name, the last part."""
    return name.strip().lstrip("-").replace("-", "_").rpartition(".")[2].lower()


def flag_of(name: str) -> str:
    """Such as "--batch-size" of "batch_size"."""
    return f"--{name.replace('_', '-')}"


def as_setting(text: str) -> str:
    """The text with the names of settings in the place of flags: "lr", "dtype: bf16"."""
    text = re.sub(r"(--[a-z0-9-]+) (\w+)\?", r"\1: \2?", text)
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), text)


def options_in(text: str) -> list[str]:
    """The options whose flags are in a text."""
    return [flag.replace("-", "_") for flag in _FLAG.findall(text)]


def _first_known(meant: tuple[str, ...], known: Collection[str]) -> str | None:
    return next((text for text in meant if {*options_in(text)} <= set(known)), None)
