"""Other processes. Horovod and mpi4py are used here and nowhere else."""
