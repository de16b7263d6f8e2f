"""Build: run the teacher once over a dataset and store its attention.

- `config`: the options of a build
- `run`: the whole build, from start to end
- `prepare`: what a build does before its tasks
- `wanted`: what the options ask for, with the teacher loaded
- `samples`: the samples that are wanted, all or a part
- `plan`: what a build will write and cost, and whether it may continue an existing cache
- `growth`: more views or samples for a cache that exists
- `codec`: which codec a build uses, with its target
- `given_codec`: the codec of another cache, with its fitted state
- `given_views`: the samples and views of another cache
- `calibrate`: fit the codec on some views and measure it
- `decode_cost`: what decoding costs beside the teacher
- `sizes`: how many bytes codes take on disk
- `tasks`: the long run: render, run the teacher, encode, compress, write
- `rendered`: batches of rendered views, which worker processes make
- `encoder`: what is done with a batch between its rendering and the disk
- `staging`: stages that overlap
- `transfers`: copies between host and device beside what is computed
- `board`: messages between the processes of one build
- `joining`: join a build that another process leads
- `on_cluster`: a build on a dask cluster, as its client leads it
- `on_worker`: a build on a dask cluster, as its workers do it
- `telling`: show how far a build is
- `shared_folder`: whether all processes see the same folder
- `summary`: what a build did
"""
