"""One visible training loop (``loop``), its steps (``step``), what it resumes from (``state``)."""
