"""NPO as a trainer of open-unlearning: copy this file to its src/trainer/unlearn/fused_npo.py

There (github.com/locuslab/open-unlearning), add to src/trainer/__init__.py

    from trainer.unlearn.fused_npo import FusedNPO
    _register_trainer(FusedNPO)

and take configs/trainer/NPO.yaml with `handler: FusedNPO`. The loss is that of its NPO trainer, on
one process; no reference model stays in memory, and no logits exist as a whole. npo_fast needs
transformers 5, where load_trainer passes the tokenizer as `processing_class`.
"""

import torch
from torch.utils.data import DataLoader
from trainer.unlearn.grad_diff import GradDiff

from npo_fast import FusedLinearNLLLoss, FusedLinearNPOLoss, head_of, sequence_log_probs


class FusedNPO(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.npo, self.nll = FusedLinearNPOLoss(beta), FusedLinearNLLLoss(reduction="token_mean")
        self.head = head_of(self.model)
        self.weight = self.head.pop("weight")  # what is left is bias, softcap and scale
        self.reference = {}  # token ids of a sequence -> log-prob before training
        size, collate = self.args.per_device_eval_batch_size, self.data_collator
        with torch.no_grad():
            self.model.eval()
            for batch in DataLoader(self.train_dataset.forget, size, collate_fn=collate):
                hidden, target = self.shifted(self.model, self._prepare_inputs(batch))
                values = sequence_log_probs(hidden, self.weight, target, shifted=True, **self.head)
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
        return self.nll(self.weight, *self.shifted(model, retain_inputs), **self.head)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget = inputs["forget"]
        reference = torch.tensor([self.reference[key] for key in self.keys(forget)])
        hidden, target = self.shifted(model, forget)
        reference = reference.to(hidden.device)
        npo = self.npo(self.weight, hidden, target, ref_log_probs=reference, **self.head)
        loss = self.gamma * npo + self.alpha * self.compute_retain_loss(model, inputs["retain"])
        return (loss, {}) if return_outputs else loss
