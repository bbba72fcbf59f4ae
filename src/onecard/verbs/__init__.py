"""One command per verb, in the order in which one comes to need them.

`look` at the machine and at models, `make` one smaller by a recipe or by teaching, `fit` it into what there
is room for, `prove` what it can do and how fast it is, `use` it. Every file adds its verbs to the `app` that
lies with what they share.

Heavy imports happen inside the verb that needs them: the help is there at once. With `--json` a verb prints
one Report on standard output and nothing else there; text for people and progress go to standard error.
"""

from onecard.verbs import fit, look, make, prove, use
from onecard.verbs.shared import app

__all__ = ["app", "fit", "look", "make", "prove", "use"]
