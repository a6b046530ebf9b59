"""Numbers that others published, each with the commands that measure it again."""
