"""One visible training loop (``loop``), its steps (``step``), and what it resumes from (``state``)."""
