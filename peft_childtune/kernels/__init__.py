"""Floor 1: autograd for weights of which only a child is trained."""

from .compose import Edit, compose_parameter
from .gate import StepGate
from .linear import child_linear

__all__ = ["Edit", "StepGate", "child_linear", "compose_parameter"]
