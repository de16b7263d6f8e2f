"""Views: fixed augmentations of a sample, drawn once, stored as numbers and replayed exactly.

- `policy`: how the views of a cache are drawn, and the names of their numbers
- `draw`: draw the numbers of one view
- `philox`: the random words that views are drawn from
- `randaugment`: the operations of RandAugment
- `corrupt`: common corruptions by name and severity, for evaluation
- `corruptions/`: what each of them does to pixels
- `mixing`: Mixup and CutMix as part of a view
- `apply`: make the pixels of a view from an image and the view's numbers
- `placement`: where the source image is in a view
- `rendering`: views from stored samples, drawn for the first time or replayed and checked
- `kept`: keep in memory what was read, up to a limit
- `jitter`: change the colours of a student's images during training
"""
