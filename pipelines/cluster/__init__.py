"""Work on the workers of a dask cluster.

- `connect`: open a cluster from what `--scheduler` says, or take a client from Python
- `local`: a cluster of this machine's GPUs or processors
- `cluster`: give work to the workers in waves, and say in a sentence why there is none to do it
- `mapping`: apply a function to many items, in threads or on a cluster
- `given`: what all pieces of some work need to know
- `worker`: what is done on a worker
"""
