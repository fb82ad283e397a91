"""What an optimizer's state says of its steps: the preconditioner, and the sharpness beyond which they diverge."""

from hessdiag.optimizers.preconditioner import Preconditioner, preconditioner_of

__all__ = ["Preconditioner", "preconditioner_of"]
