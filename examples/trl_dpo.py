"""DPO in TRL's DPOTrainer: python examples/trl_dpo.py MODEL PAIRS.jsonl

A pair has a "prompt", a "chosen" answer (such as a refusal) and a "rejected" one, which is to be
forgotten. TRL computes the reference's log-probs before training, so that no second model stays in
memory; the loss and its gradients come from hidden states, without whole logits.
"""

import sys
from functools import cached_property

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from npo_fast import FusedLinearDPOLoss, head_of


class FusedDPOTrainer(DPOTrainer):
    @cached_property
    def head(self):
        head = head_of(self.model)
        return head.pop("weight"), head  # bias, softcap and scale

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight, head = self.head
        dpo, decoder = FusedLinearDPOLoss(self.beta, pairs="concatenated"), self.model.get_decoder()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        loss = dpo(weight, hidden[:, :-1], labels[:, 1:], ref_log_probs=reference, **head)
        loss = loss * self.beta / 2  # TRL's scale: npo_fast has the NPO paper's factor 2 / beta
        return (loss, {}) if return_outputs else loss


def unlearn(model, tokenizer, pairs, output, trainer_class=FusedDPOTrainer, **arguments):
    arguments = {"report_to": "none", "logging_steps": 1, **arguments}
    trainer = trainer_class(
        model,
        args=DPOConfig(output, precompute_ref_log_probs=True, **arguments),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.partition("\n")[0])
    model_name, file = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    pairs = load_dataset("json", data_files=file, split="train")
    bf16 = torch.cuda.is_available()
    history = unlearn(model, tokenizer, pairs, "unlearned", learning_rate=1e-6, bf16=bf16)
    print(*history, sep="\n")
