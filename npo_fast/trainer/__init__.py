"""One visible training loop (``loop``), its steps (``step``), and what resuming takes (``state``)."""
