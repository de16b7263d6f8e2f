"""Train: students from a cache, and the runs they are compared with.

- `config`: the options of a run
- `run`: train one student, or several from one stream of batches
- `loop`: the loop over batches
- `student_run`: one student in training: its state and its step
- `compiled`: torch.compile of a student
- `sweep`: the configs of a sweep
- `data`: what a run needs, opened and checked: student, views, order, teacher and validation
- `optimiser`: the optimiser and the learning rates
- `validation`: validation sets
- `kept_classes`: a list of the classes to score on
- `scores`: how well predictions of students fit labels
- `map_pictures`: pictures of maps during a run
- `recipes`: settings in a TOML file
- `notes`: what a user should know before a run
- `summary`: the results of a finished run
"""
