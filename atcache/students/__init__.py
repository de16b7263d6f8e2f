"""Students: models that use a teacher's attention while they train.

- `student`: students of the four modes behind one interface
- `make`: make a student for a training loop of your own
- `batches`: batches of a cache for a training loop of your own
- `pairing`: which layers and heads of the teacher go to which of the student
- `copy`: a student that attends with the teacher's attention
- `distil`: a student with its own attention, and a loss that pulls it towards the teacher's
- `attend`: attention calls with a given map or a given factor
- `given`: modules that use values they are given instead of computing them
- `teacher_side`: what comes from the teacher with each batch, from a cache or from the running teacher
"""
