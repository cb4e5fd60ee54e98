"""The random teacher and the handful of latents of the distillation tests."""

from tests.distill.conftest import source, teacher

__all__ = ["source", "teacher"]
