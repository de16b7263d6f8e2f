"""The viewer: a page in the browser that reads caches itself, and the small server that gives it their files.

- `config`: the options
- `run`: serve caches until Ctrl-C, or export them
- `server`: HTTP: ranges, HEAD, CORS, and who may ask
- `site`: what is at which address
- `files`: the files behind it: parts of local and remote ones, and which of a cache may be read
- `images`: the images of samples and views, made when they are asked for
- `export`: a page with chosen samples, as a folder or as one file
- `chosen`: chosen samples of a cache, as a small cache of their own

`page/` is the page's source; `built/` is what `make page` makes of it, and what is installed.
"""
