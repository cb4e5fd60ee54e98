"""Folders of twostep's models that make no pictures, named by this package's entry points."""

from pathlib import Path

NANO_AUDIO = Path(__file__).parent / "nano-audio"
"""Notes of instruments, with students of 8, 4, 2 and 1 steps."""

NANO_MOTION = Path(__file__).parent / "nano-motion"
"""Clips of nano's drawings that move; a teacher without students so far."""
