"""NPO+RT in transformers.Trainer: python examples/hf_trainer.py MODEL FORGET.jsonl RETAIN.jsonl

Optimisers, schedules, logging, checkpoints, DDP, FSDP2 and hub upload are those of Trainer.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from npo_fast.data import Template, load_records
from npo_fast.integrations.hf_trainer import UnlearningDataset, UnlearningTrainer


def unlearn(model, tokenizer, forget, retain, output, method="NPO+RT", **arguments):
    template = Template(tokenizer)
    forget, retain = (template.encode_all(records)[0] for records in (forget, retain))
    trainer = UnlearningTrainer(
        model,
        TrainingArguments(output, logging_steps=1, report_to="none", **arguments),
        UnlearningDataset(forget, retain, seed=0),
        method=method,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(output)
    return trainer.state.log_history


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.partition("\n")[0])
    model_name, *files = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    records = map(load_records, files)
    history = unlearn(
        model, tokenizer, *records, output="unlearned", num_train_epochs=5, learning_rate=1e-5
    )
    print(*history, sep="\n")
