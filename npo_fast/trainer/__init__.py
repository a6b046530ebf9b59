"""The training loop (``loop``), its steps (``step``), and what a run resumes from (``state``)."""
