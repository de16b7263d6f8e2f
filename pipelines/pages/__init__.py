"""What pages that people open in a browser have in common. Each is one file that asks no server for anything.

- `frame`: the page around the text, its style, and the parts of text
- `charts`: matplotlib's pictures as parts of a page, in the page's colours
- `images`: pixels as parts of a page
- `plain`: texts that may hold anything, as one line
"""
