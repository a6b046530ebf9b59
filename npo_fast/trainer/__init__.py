"""One visible training loop (``loop``), the run folder that keeps what it did (``run``), and what
it takes to go on after a crash (``state``, ``resume``, ``interrupt``, ``out_of_memory``)."""
