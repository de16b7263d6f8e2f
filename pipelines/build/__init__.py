"""Build: run the teacher once over a dataset and store its attention.

- `config`: what a build is asked for
- `run`: the whole build, from start to end
- `plan`: what a build will write and cost, and whether an existing cache is the one asked for
- `codec`: which codec a build uses, and the target it is to meet
- `calibrate`: fit the codec on some views and measure it
- `sizes`: how many bytes codes take on disk
- `tasks`: the long run: render, run the teacher, encode, compress, write
- `board`: what the processes of one build tell each other
- `shared_folder`: whether all processes see the same folder
- `summary`: what a build did
"""
