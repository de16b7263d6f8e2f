"""Students: models that use a teacher's attention while they train.

- `student`: students of the four modes behind one interface
- `make`: a student for a training loop of one's own
- `batches`: batches of a cache for a training loop of one's own
- `pairing`: which layers and heads of the teacher go to which of the student
- `copy`: a student that attends with the teacher's attention
- `distil`: a student that attends by itself, with a loss that pulls it towards the teacher
- `attend`: attention calls with a given map or a given factor
- `given`: modules that take values they are given in place of computing them
- `teacher_side`: what comes from the teacher with each batch, from a cache or from the running teacher
"""
