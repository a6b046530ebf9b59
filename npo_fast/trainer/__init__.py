"""One visible training loop (``loop``), and the run folder that keeps what it did (``run``)."""
