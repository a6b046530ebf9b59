"""Small experiments around the paper's claims: seeds, beta, collapse, entanglement, schedules."""
