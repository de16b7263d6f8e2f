"""Pack: make WebDataset tars of images that lie about in other forms. The bytes of the images do not change.

- `config`: the options of a pack
- `run`: the whole pack, from start to end
- `plan`: which image goes into which tar, under which key, with which label
- `classes`: the names of the classes, whose positions are the labels
- `csv_labels`: labels from a CSV file
- `folders`: the images of an image folder
- `tables`: the images of Hugging Face datasets: parquet and arrow files
- `splits`: which files belong to which subset and split, from their names
- `hub`: datasets on the Hugging Face hub
"""
