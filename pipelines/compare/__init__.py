"""How near the maps of two caches are to each other: two teachers, two codecs, a teacher and its student.

- `config`: the options
- `same_views`: the views that both caches have, proven to be the same
- `pairs`: which layer and head of one cache is compared with which of the other
- `run`: how near the maps are, and the views where they are furthest apart
"""
