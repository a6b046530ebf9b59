"""How long a process may be silent, or keep others waiting: seconds."""

INTERVAL_S = 1.0  # between two records of a process
QUIET_S = 4.0  # without a new record; enough to name a process once a collective has failed
NOTICE_S = 5.0  # within which a process notices by itself that another one failed
SILENT_LIMIT_S = 20.0  # with NOTICE_S less than the 30 s that torchrun leaves after a SIGTERM
MEETING_LIMIT_S = 1800.0  # until the last process has come: models load at different speeds
HANG_LIMIT_S = 600.0
HANG_VARIABLE = "NPO_FAST_COLLECTIVE_TIMEOUT_S"
