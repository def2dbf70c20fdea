"""The optimizers' update maths in Python: a file each, and what they are written with.

Attributes:
    RULES: every rule by its name.
"""

from .adam import ADAM
from .frozen import FROZEN
from .lamb import LAMB
from .lars import LARS
from .rmsprop import RMSPROP
from .rule import Rule
from .sgd import SGD

RULES: dict[str, Rule] = {rule.name: rule for rule in (FROZEN, SGD, ADAM, RMSPROP, LARS, LAMB)}
