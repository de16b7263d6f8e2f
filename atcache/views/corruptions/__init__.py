"""The 15 common corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), each with five severities.

Each is a function of (pixels_HWC, severity, draws) that returns new pixels. Names and severities are parsed in
`atcache.views.corrupt`. Constants are those of ImageNet-C; lengths in pixels, which are for views of 224, follow the
shorter side of the view. The same seed gives the same pixels on every machine with the same Pillow: what is random
comes from raw words, weights are whole numbers so that sums do not depend on their order, and the rest is only + - * /
of float64.

- `draws`: random numbers from a seed
- `filters`: blur, shift and move pixels
- `noise`: Gaussian, shot and impulse noise
- `blur`: defocus, glass, motion and zoom blur
- `weather`: snow, frost, fog and brightness
- `plasma`: clouds and ice, drawn
- `digital`: contrast, elastic transform, pixelate and JPEG compression
"""
