"""Communication between processes: Horovod and mpi4py are used here and nowhere else.

A job hangs if one rank skips a collective that the others enter: `World.sum`, `max`, `any`, `gather`, `average`, `broadcast`,
`barrier`, or the gradients of a wrapped optimizer. The docstring of a function that calls one says "A collective".
`training/trainer.py` fixes their order, and `training/plan.py` decides in which cycles they happen.
"""
