"""Drop-in for HINTLab/PlaneCycle: models of the authors' code, and their way to make them. Nothing of theirs is copied.

May import `engine`, `hosts`, `ops` and what is below them. Nothing imports it but the package itself.

Start with `converter.PlaneCycleConverter`, which takes the authors' arguments and gives a model with their keys and
outputs; `accelerate.py` makes a model that their own code has built run without their copies between planes, and
`accelerated.py` holds the methods that it has then.
"""
