"""The losses inside other people's trainers."""
