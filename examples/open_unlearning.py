"""NPO as a trainer of open-unlearning (github.com/locuslab/open-unlearning), on one process.

Copy this file to src/trainer/unlearn/fused_npo.py, add to src/trainer/__init__.py

    from trainer.unlearn.fused_npo import FusedNPO
    _register_trainer(FusedNPO)

and take configs/trainer/NPO.yaml with `handler: FusedNPO`. The loss is that of its NPO trainer; no
reference model stays in memory, and no logits exist as a whole. npo_fast needs transformers 5,
where load_trainer passes the tokenizer as `processing_class`.
"""

import torch
from torch.utils.data import DataLoader
from trainer.unlearn.grad_diff import GradDiff

from npo_fast import FusedLinearNLLLoss, FusedLinearNPOLoss, head_of, sequence_log_probs


class FusedNPO(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        head = head_of(self.model)
        self.head = head.pop("weight"), head.pop("bias")  # what is left is softcap and scale
        self.npo = FusedLinearNPOLoss(beta, **head)
        self.nll = FusedLinearNLLLoss(reduction="token_mean", **head)
        self.reference = {}  # token ids of a sequence -> log-prob before training
        size, collate = self.args.per_device_eval_batch_size, self.data_collator
        with torch.no_grad():
            self.model.eval()
            for batch in DataLoader(self.train_dataset.forget, size, collate_fn=collate):
                hidden, target = self.shifted(self.model, self._prepare_inputs(batch))
                weight, bias = self.head
                values = sequence_log_probs(hidden, weight, target, shifted=True, bias=bias, **head)
                self.reference |= zip(self.keys(batch), values.tolist(), strict=True)

    def keys(self, batch):
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        return [tuple(t for t, real in zip(*row, strict=True) if real) for row in rows]

    def shifted(self, model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return hidden[:, :-1], batch["labels"][:, 1:]

    def compute_retain_loss(self, model, retain_inputs):
        if self.retain_loss_type != "NLL":
            return super().compute_retain_loss(model, retain_inputs)
        weight, bias = self.head
        return self.nll(weight, *self.shifted(model, retain_inputs), bias)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget, (weight, bias) = inputs["forget"], self.head
        reference = torch.tensor([self.reference[key] for key in self.keys(forget)])
        reference = reference.to(weight.device)
        loss = self.gamma * self.npo(weight, *self.shifted(model, forget), bias, reference)
        loss = loss + self.alpha * self.compute_retain_loss(model, inputs["retain"])
        return (loss, {}) if return_outputs else loss
