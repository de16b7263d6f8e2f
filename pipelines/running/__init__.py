"""What every long run needs: its folder, processes, checkpoints, metrics and progress, and how it is stopped.

- `run_folder`: a folder belongs to one run, and one process at a time works in it
- `run_files`: the names of the files in that folder
- `run_record`: what is recorded of its student, and how to load the student
- `run_teacher`: teachers by name, and finished runs as teachers
- `checkpoint`: save the state of a run and load it again
- `interrupts`: stop between two steps at Ctrl-C or SIGTERM
- `metrics`: the numbers of a run, in a file and for TensorBoard
- `progress`: show how far a run is
- `stages`: show how far work is that has stages
- `commands`: what was run, as commands to type
- `ranks`: several processes that work together, as `torchrun` starts them
"""
